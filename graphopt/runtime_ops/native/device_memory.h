// Working memory on the device, for as long as the kernels of one stream need it.
#pragma once

#include <cstddef>

#include "cuda_call.h"

namespace graphopt {

// From a pool of the current device, in the order of the stream: neither waits for the device. The pool keeps some of
// what it was given back, so that a node that runs again finds its memory. Both return a cudaError_t.
int allocate_on_device(void** memory, size_t bytes, void* stream);
int free_on_device(void* memory, void* stream);

// Stream-ordered memory of CUDA itself, not ONNX Runtime's allocator: the runs of one node on several streams each have
// their own, nothing has to be known about the arena's streams, and CUDA graphs can record it.
class DeviceMemory {
 public:
  // No bytes: no memory.
  DeviceMemory(size_t bytes, void* stream) : stream_(stream) {
    if (bytes > 0) require_launched(allocate_on_device(&memory_, bytes, stream));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    if (memory_ != nullptr) free_on_device(memory_, stream_);
  }

  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
  void* stream_;
};

}  // namespace graphopt
