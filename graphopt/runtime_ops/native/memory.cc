// How fast this machine reads memory: the limit that kernels are held against.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(_WIN32)
#define GRAPHOPT_EXPORT extern "C" __declspec(dllexport)
#else
#define GRAPHOPT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr size_t kLine = 64;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Every byte of [from, from + bytes), whole lines, with lines fetched `ahead` bytes before they are read. Several places
// are read in turn: one alone waits at the end of each page, where the hardware stops fetching ahead.
template <int kPlaces>
uint64_t read(const uint8_t* from, size_t bytes, size_t ahead) {
  const size_t part = bytes / kPlaces / kLine * kLine;
  uint64_t sums[8] = {};
  for (size_t at = 0; at < part; at += kLine) {
    for (int place = 0; place < kPlaces; ++place) {
      const uint8_t* here = from + place * part + at;
      if (ahead != 0) __builtin_prefetch(here + ahead);  // past the end it does nothing
      uint64_t line[8];
      std::memcpy(line, here, kLine);
      for (int i = 0; i < 8; ++i) sums[i] += line[i];
    }
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

// The most bytes a second that `threads` threads read together, each a part of one buffer of `bytes`: the best of
// `rounds` passes with each of several distances of prefetching, at one place and at four. 0: no memory for the buffer.
GRAPHOPT_EXPORT double graphopt_read_bandwidth(int threads, size_t bytes, int rounds) {
  const size_t count = size_t(std::max(threads, 1));
  const size_t part = bytes / count / kLine * kLine;
  std::unique_ptr<uint8_t[]> buffer(new (std::nothrow) uint8_t[part * count + kLine]);
  if (part == 0 || !buffer) return 0;
  std::memset(buffer.get(), 1, part * count + kLine);
  const uint8_t* first = buffer.get() + (kLine - reinterpret_cast<uintptr_t>(buffer.get()) % kLine) % kLine;
  double best = 0;
  std::atomic<uint64_t> sink{0};
  for (size_t way = 0; way < 8; ++way) {
    const size_t ahead = std::array<size_t, 4>{0, 1024, 2048, 4096}[way / 2];
    auto* reader = way % 2 == 0 ? read<1> : read<4>;
    std::atomic<size_t> arrived{0};
    std::vector<double> begun(count * size_t(std::max(rounds, 1))), ended(begun.size());
    auto work = [&](size_t thread) {
      for (size_t round = 0; round < begun.size() / count; ++round) {
        // All of them start together.
        arrived.fetch_add(1);
        while (arrived.load() < (round + 1) * count) std::this_thread::yield();
        begun[round * count + thread] = now();
        sink.fetch_add(reader(first + thread * part, part, ahead), std::memory_order_relaxed);
        ended[round * count + thread] = now();
      }
    };
    std::vector<std::thread> others;
    for (size_t thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
    for (size_t round = 0; round < begun.size() / count; ++round) {
      const double* b = begun.data() + round * count;
      const double* e = ended.data() + round * count;
      const double seconds = *std::max_element(e, e + count) - *std::min_element(b, b + count);
      best = std::max(best, double(part / (4 * kLine) * (4 * kLine) * count) / seconds);
    }
  }
  return best;
}
