// Memory is short for the fuzzer, as a machine has it where a model asks for more than there is.
#include <cstdlib>
#include <new>

namespace {
constexpr size_t kMostBytes = size_t(256) << 20;
}

void* operator new(size_t size) {
  void* made = size > kMostBytes ? nullptr : std::malloc(size);
  if (made == nullptr) throw std::bad_alloc();
  return made;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
