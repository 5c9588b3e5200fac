// The CUDA kernel of CodebookMatMul. Sizes are checked here; what the tensors of the device hold, there.
#include "cuda_call.h"
#include "launchers.h"
#include "sizes.h"

namespace graphopt::codebook_matmul {
namespace {

class CodebookMatMul final : public Kernel {
 public:
  explicit CodebookMatMul(const Node& node) : attributes_(node) {}

  void compute(Call& call) override {
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < kInputs; ++i) inputs.push_back(call.input(i));
    const Tensor& x = inputs[kX];
    const Sizes sizes(attributes_, inputs);
    GRAPHOPT_REQUIRE(sizes.tile_rows <= INT32_MAX && sizes.tile_columns <= INT32_MAX, "the tiles are too large");
    const GraphoptCodebookWeights weights{
        inputs[kIndices].as<uint8_t>(),
        inputs[kCodebooks].as<float>(),
        inputs[kScales].data,
        sizes.selected ? inputs[kSelectors].as<uint8_t>() : nullptr,
        sizes.has_outliers ? inputs[kOutlierRows].as<int32_t>() : nullptr,
        inputs[kOutlierColumns].as<int32_t>(),
        inputs[kOutlierValues].as<float>(),
        sizes.has_bias ? inputs[kBias].data : nullptr,
        sizes.rows,
        sizes.columns,
        sizes.group_size,
        sizes.books,
        sizes.outliers,
        int32_t(attributes_.bits),
        int32_t(sizes.tile_rows),
        int32_t(sizes.tile_columns),
        sizes.half_scales,
    };
    void* y = call.output(0, product_shape(sizes, x));
    auto* launch =
        x.type == ElementType::float16 ? graphopt_cuda_codebook_matmul_half : graphopt_cuda_codebook_matmul_float;
    require_launched(launch(x.data, &weights, y, rows_of(x.shape), attributes_.activation_block, call.cuda_stream()));
  }

 private:
  Attributes attributes_;
};

const Registration registration{described(make<CodebookMatMul>, "CUDAExecutionProvider")};

}  // namespace
}  // namespace graphopt::codebook_matmul
