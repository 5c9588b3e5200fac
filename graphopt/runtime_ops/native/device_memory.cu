#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "launcher.h"

namespace {

// A pool of the library's own: the device's default pool is everybody's, and by default gives memory back to the system
// whenever the device is waited for.
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
    uint64_t all = UINT64_MAX;
    if (const cudaError_t refused = cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &all)) return refused;
  }
  *pool = made;
  return cudaSuccess;
}

}  // namespace

GRAPHOPT_LAUNCHER int graphopt_cuda_allocate(void** memory, size_t bytes, void* stream) {
  int device = 0;
  if (const cudaError_t refused = cudaGetDevice(&device)) return refused;
  cudaMemPool_t pool = nullptr;
  if (const cudaError_t refused = pool_of(device, &pool)) return refused;
  return cudaMallocFromPoolAsync(memory, bytes, pool, static_cast<cudaStream_t>(stream));
}

GRAPHOPT_LAUNCHER int graphopt_cuda_free(void* memory, void* stream) {
  return cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
}
