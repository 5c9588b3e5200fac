// A quantized weight as inputs of a node, and rows of activations made ready for it.
#pragma once

#include <string>

#include "buffer.h"
#include "float16.h"
#include "kernels.h"
#include "operator.h"

namespace graphopt::quantized_linear {

// How the numbers of a node's weights are made; from its attributes.
struct Format {
  explicit Format(const Node& node)
      : bits(int(node.integer("bits"))),
        block(node.integer("block_size")),
        terms(node.integer("activation_bits") == 16 ? 2 : 1) {
    GRAPHOPT_REQUIRE(bits == 2 || bits == 4 || bits == 8, "bits is %d, and must be 2, 4 or 8", bits);
    GRAPHOPT_REQUIRE(block >= 16 && block <= 256 && (block & (block - 1)) == 0,
                     "block_size is %lld, and must be a power of two from 16 to 256", (long long)block);
    const int64_t activation = node.integer("activation_bits");
    GRAPHOPT_REQUIRE(activation == 8 || activation == 16, "activation_bits is %lld, and must be 8 or 16",
                     (long long)activation);
  }
  int bits;
  int64_t block;
  int terms;
};

// The matrix that stands at inputs `first` (packed numbers), + 1 (scales), + 2 (zero points), + 3 (minimums) of a node.
template <typename Inputs>
Matrix matrix(const Inputs& input, size_t first, const Format& format, const char* name) {
  const Tensor packed = input(first), scales = input(first + 1), zeros = input(first + 2), minimums = input(first + 3);
  GRAPHOPT_REQUIRE(packed.shape.size() == 3, "%s must be [rows, blocks, bytes], not %s", name, text(packed.shape).c_str());
  GRAPHOPT_REQUIRE(packed.dim(2) == format.block * format.bits / 8, "%s has %lld bytes a block, and %lld numbers of %d bits take %lld",
                   name, (long long)packed.dim(2), (long long)format.block, format.bits,
                   (long long)(format.block * format.bits / 8));
  // Only a weight without elements can say more; its products of sizes would overflow.
  GRAPHOPT_REQUIRE(packed.dim(0) < int64_t(1) << 40 && packed.dim(1) < int64_t(1) << 31, "%s has impossible sizes %s",
                   name, text(packed.shape).c_str());
  Matrix made;
  made.bits = format.bits;
  made.block = format.block;
  made.rows = packed.dim(0);
  made.length = packed.dim(1) * format.block;
  made.packed = packed.as<uint8_t>();
  made.scales = scales.data;
  made.half = scales.type == ElementType::float16;
  const int64_t count = made.rows * packed.dim(1);
  GRAPHOPT_REQUIRE(scales.size() == count, "%s has %lld blocks and %lld scales", name, (long long)count,
                   (long long)scales.size());
  if (zeros.size() > 0) {
    const int64_t bytes = made.rows * ((packed.dim(1) * format.bits + 7) / 8);
    GRAPHOPT_REQUIRE(zeros.size() == bytes, "%s needs %lld bytes of zero points, and has %lld", name, (long long)bytes,
                     (long long)zeros.size());
    made.zero_points = zeros.as<uint8_t>();
  }
  if (minimums.size() > 0) {
    GRAPHOPT_REQUIRE(minimums.size() == count, "%s has %lld blocks and %lld minimums", name, (long long)count,
                     (long long)minimums.size());
    made.minimums = minimums.data;
  }
  return made;
}

// Room for a task's numbers, this thread's own; what it held is lost.
inline float* numbers(int64_t count) {
  thread_local Buffer room;
  return reinterpret_cast<float*>(room.reserve(size_t(count) * sizeof(float)));
}

// A row of numbers as float32: where it lies, or converted into `room`.
inline const float* as_floats(const Tensor& tensor, int64_t begin, int64_t count, float* room) {
  if (tensor.type != ElementType::float16) return tensor.as<float>() + begin;
  const Half* from = tensor.as<Half>() + begin;
  for (int64_t i = 0; i < count; ++i) room[i] = to_float(from[i]);
  return room;
}

// Rows of a task, so that a task streams some 32 KiB and there are several for each thread; a multiple of `step`.
inline int64_t rows_of_task(const Matrix& matrix, int64_t step) {
  const int64_t rows = 32768 / (matrix.row_bytes() + 1);
  const int64_t most = (matrix.rows + 7) / 8;
  const int64_t wanted = rows < most ? rows : most;
  return wanted < step ? step : wanted / step * step;
}

// The gains of a norm over rows of `length` numbers; null: there is no norm.
inline const float* gains(const Tensor& norm, int64_t length) {
  GRAPHOPT_REQUIRE(norm.size() == 0 || norm.size() == length, "the norm has %lld gains, and rows %lld numbers",
                   (long long)norm.size(), (long long)length);
  return norm.size() > 0 ? norm.as<float>() : nullptr;
}

// Whether inputs [first, last) of a node are all constants; those that are come to their places in `found`.
inline bool constants(const Node& node, size_t first, size_t last, Tensor* found) {
  bool all = true;
  for (size_t i = first; i < last; ++i) all = node.constant(i, &found[i]) && all;
  return all;
}

// x and scales may each be float32 or float16: the types of x, and those of the scales beside them.
inline std::vector<ElementType> activation_types() {
  return {ElementType::float32, ElementType::float32, ElementType::float16, ElementType::float16};
}
inline std::vector<ElementType> scale_types() {
  return {ElementType::float32, ElementType::float16, ElementType::float32, ElementType::float16};
}

}  // namespace graphopt::quantized_linear
