#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace graphopt {
namespace {

// What a pool keeps when the device is waited for: more than single tokens ever need.
constexpr uint64_t kKept = 64 << 20;

// A pool of the library's own: the device's default pool is everybody's, and by default keeps nothing.
cudaError_t pool_of(int device, cudaMemPool_t* pool) {
  static std::mutex mutex;
  static std::vector<cudaMemPool_t> pools;
  std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= pools.size()) pools.resize(size_t(device) + 1, nullptr);
  cudaMemPool_t& made = pools[size_t(device)];
  if (made == nullptr) {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    if (const cudaError_t refused = cudaMemPoolCreate(&made, &properties)) {
      made = nullptr;
      return refused;
    }
    uint64_t kept = kKept;
    const cudaError_t refused = cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept);
    if (refused != cudaSuccess) return refused;
  }
  *pool = made;
  return cudaSuccess;
}

}  // namespace

int allocate_on_device(void** memory, size_t bytes, void* stream) {
  int device = 0;
  if (const cudaError_t refused = cudaGetDevice(&device)) return refused;
  cudaMemPool_t pool = nullptr;
  if (const cudaError_t refused = pool_of(device, &pool)) return refused;
  return cudaMallocFromPoolAsync(memory, bytes, pool, static_cast<cudaStream_t>(stream));
}

int free_on_device(void* memory, void* stream) {
  return cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
}

}  // namespace graphopt
