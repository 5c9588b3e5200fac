// Enough of CUDA to compile the kernels for the host and run them, each thread a coroutine: index arithmetic, barriers and
// numbers are held against references where there is no GPU. Thread blocks run one behind the other. Threads run until
// they wait, in rising or in falling order, so that a missing barrier shows in one of the two; threads that wait for what
// never comes fail the launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchTimeout = 702;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace on_host {

constexpr size_t kStack = 256 << 10;

struct Barrier {
  unsigned arrived = 0, round = 0;
};

struct Thread {
  ucontext_t context;  // where it begins
  jmp_buf place;  // where it waits: jumps there ask nothing of the system, as a change of context does
  bool begun = false;
  dim3 index;
  unsigned number = 0;
  const Barrier* barrier = nullptr;  // what it waits for, until the round is another
  unsigned round = 0;
  bool done = false;

  bool ready() const { return !done && (barrier == nullptr || barrier->round != round); }
};

struct Device {
  std::vector<Thread> threads;
  std::vector<char> stacks, dynamic;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchanged;  // one for each thread
  Barrier block;
  dim3 block_index, block_size, grid_size;
  jmp_buf main;
  std::function<void()> body;
  unsigned current = 0, left = 0;
  bool backwards = false;
  int error = cudaSuccess;
};
inline Device device;

inline Thread& current() { return device.threads[device.current]; }

inline void go_on(Thread& thread) {
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.context);
}

// Lets the next thread that has nothing to wait for run; back where all are through, or wait for what never comes.
inline void yield() {
  const unsigned count = unsigned(device.threads.size()), from = device.current;
  for (unsigned i = 0; i < count; ++i) {
    device.current = device.backwards ? (device.current + count - 1) % count : (device.current + 1) % count;
    if (!current().ready()) continue;
    if (device.current != from && _setjmp(device.threads[from].place) == 0) go_on(current());
    return;
  }
  if (device.left != 0) device.error = cudaErrorLaunchTimeout;
  _longjmp(device.main, 1);
}

inline void wait(Barrier& barrier, unsigned threads) {
  Thread& thread = current();
  thread.barrier = &barrier, thread.round = barrier.round;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.round;
  } else {
    yield();
  }
}

inline void start() {
  device.body();
  current().done = true;
  --device.left;
  yield();
}

inline unsigned warp_size() { return std::min(32u, unsigned(device.threads.size()) - current().number / 32 * 32); }
inline void wait_for_warp() { wait(device.warps[current().number / 32], warp_size()); }

template <typename T>
T of_lane(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned number = current().number;
  std::memcpy(&device.exchanged[number], &value, sizeof value);
  wait_for_warp();
  T found;
  std::memcpy(&found, &device.exchanged[number / 32 * 32 + unsigned(lane & 31)], sizeof found);
  wait_for_warp();
  return found;
}

template <typename... P>
struct Launch {
  void (*kernel)(P...);
  dim3 grid, block;
  size_t bytes;

  void operator()(P... arguments) {
    if (device.error != cudaSuccess) return;
    const unsigned count = block.x * block.y * block.z;
    device.grid_size = grid, device.block_size = block;
    device.body = [&] { kernel(arguments...); };
    device.stacks.resize(count * kStack);
    for (unsigned b = 0; b < grid.x * grid.y * grid.z && device.error == cudaSuccess; ++b) {
      device.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      device.threads.assign(count, Thread());
      device.warps.assign((count + 31) / 32, Barrier());
      device.exchanged.assign(count, 0);
      device.dynamic.assign(bytes + 16, char(0xff));
      device.block = Barrier();
      device.left = count;
      for (unsigned t = 0; t < count; ++t) {
        Thread& thread = device.threads[t];
        thread.number = t;
        thread.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = device.stacks.data() + t * kStack;
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
      }
      device.current = device.backwards ? count - 1 : 0;
      if (_setjmp(device.main) == 0) go_on(current());
    }
  }
};

// kernel<<<grid, block, bytes, stream>>>(...), as on_host::launch(kernel, grid, block, bytes, stream)(...).
template <typename... P>
Launch<P...> launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t bytes = 0, cudaStream_t = nullptr) {
  return {kernel, grid, block, bytes};
}

inline void* dynamic_memory() {
  return device.dynamic.data() + (16 - reinterpret_cast<uintptr_t>(device.dynamic.data()) % 16) % 16;
}

}  // namespace on_host

#define threadIdx (on_host::current().index)
#define blockIdx (on_host::device.block_index)
#define blockDim (on_host::device.block_size)
#define gridDim (on_host::device.grid_size)

extern "C" __attribute__((visibility("default"), used)) inline void on_host_run_backwards(int backwards) {
  on_host::device.backwards = backwards != 0;
}

inline cudaError_t cudaGetLastError() { return std::exchange(on_host::device.error, cudaSuccess); }
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t stream = nullptr) {
  for (size_t row = 0; row < height; ++row) {
    cudaMemcpyAsync(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width,
                    kind, stream);
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename K>
cudaError_t cudaFuncSetAttribute(K, int, int bytes) {
  return bytes > 227 << 10 ? cudaErrorInvalidValue : cudaSuccess;
}

inline void __syncthreads() { on_host::wait(on_host::device.block, unsigned(on_host::device.threads.size())); }
inline void __syncwarp(unsigned = 0xffffffffu) { on_host::wait_for_warp(); }
inline int lane_on_host() { return int(on_host::current().number % 32); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::of_lane(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return on_host::of_lane(value, lane_on_host() ^ distance);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  return on_host::of_lane(value, std::min(lane_on_host() + distance, 31));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return on_host::of_lane(value, std::max(lane_on_host() - distance, 0));
}

using std::max;
using std::min;
template <typename To, typename From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To made;
  std::memcpy(&made, &value, sizeof made);
  return made;
}
inline int __float_as_int(float value) { return same_bits<int>(value); }
inline float __int_as_float(int value) { return same_bits<float>(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline int __float2int_rn(float a) { return int(std::lrint(a)); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return sum;
}
