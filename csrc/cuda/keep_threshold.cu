// lpaf_kernels::keep_threshold for CUDA tensors.
#include "cuda/keep_threshold.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/binding.h"
#include "tensor_checks.h"

namespace lpaf::cuda {
namespace {

constexpr const char* kOp = "keep_threshold";

class GpuLauncher {
  public:
    explicit GpuLauncher(cudaStream_t stream) : stream_(stream) {}

    template <class Program>
    void run(int64_t blocks, const typename Program::Arguments& arguments) const {
        program_kernel<Program><<<static_cast<unsigned>(blocks), Program::kThreads, 0, stream_>>>(arguments);
        check_launch(kOp, cudaGetLastError());
    }

  private:
    cudaStream_t stream_;
};

bool is_on_device_of(const Tensor& tensor, const Tensor& other) {
    return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

void check_arguments(const std::vector<Tensor>& scores, double keep,
                     const std::optional<std::vector<Tensor>>& weights) {
    if (scores.empty()) invalid(kOp, ": scores is an empty list, expected at least one tensor");
    if (!(keep >= 0.0 && keep <= 1.0)) invalid(kOp, ": keep is ", keep, ", expected a share in [0, 1]");
    if (weights && weights->size() != scores.size()) {
        invalid(kOp, ": weights has ", weights->size(), " tensors, expected one per tensor of scores, ",
                scores.size());
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
        if (!is_on_device_of(scores[i], scores[0])) {
            invalid(kOp, ": scores[", i, "] is not on the CUDA device of scores[0]");
        }
        if (scores[i].scalar_type() != scores[0].scalar_type()) {
            invalid(kOp, ": scores[", i, "] has dtype ", torch::headeronly::toString(scores[i].scalar_type()),
                    ", expected that of scores[0], ", torch::headeronly::toString(scores[0].scalar_type()));
        }
        if (!weights) continue;
        const Tensor& weight = (*weights)[i];
        if (!is_on_device_of(weight, scores[0]) || weight.scalar_type() != ScalarType::Long ||
            weight.numel() != scores[i].numel()) {
            invalid(kOp, ": weights[", i, "] has shape ", shape_of(weight), " and dtype ",
                    torch::headeronly::toString(weight.scalar_type()),
                    ", expected one int64 count on the device of scores per entry of scores[", i, "], ",
                    shape_of(scores[i]));
        }
    }
}

template <class Format, bool kWeighted>
std::tuple<Tensor, Tensor> select(const std::vector<Tensor>& scores, double keep, bool across,
                                  const std::optional<std::vector<Tensor>>& weights) {
    using Value = typename Format::Value;
    constexpr ScalarType value_type = sizeof(Value) == 8 ? ScalarType::Double : ScalarType::Float;
    std::vector<Tensor> contiguous;  // keeps copies of strided tensors alive until all is launched
    std::vector<radix_select::ScoreSpan> spans;
    const auto data_of = [&contiguous](const Tensor& tensor) {
        contiguous.push_back(torch::stable::contiguous(tensor));
        return contiguous.back().const_data_ptr();
    };
    for (std::size_t i = 0; i < scores.size(); ++i) {
        const void* data = data_of(scores[i]);
        const auto* counts = kWeighted ? static_cast<const int64_t*>(data_of((*weights)[i])) : nullptr;
        spans.push_back({data, counts, scores[i].numel()});
    }

    const auto count = static_cast<int64_t>(spans.size());
    const Tensor value = torch::stable::new_empty(scores[0], {count}, value_type);
    const Tensor tie_index = torch::stable::new_empty(scores[0], {count}, ScalarType::Long);
    const radix_select::KeepThreshold<Format, kWeighted> selection(std::move(spans), keep, across);
    const Tensor workspace = torch::stable::new_empty(
        scores[0], {static_cast<int64_t>(selection.workspace_bytes())}, ScalarType::Byte);
    const GpuLauncher launcher(current_stream(kOp, scores[0].get_device_index()));
    selection.run(workspace.mutable_data_ptr(), static_cast<Value*>(value.mutable_data_ptr()),
                  static_cast<int64_t*>(tie_index.mutable_data_ptr()), launcher);
    return {value, tie_index};
}

template <class Format>
std::tuple<Tensor, Tensor> select_any(const std::vector<Tensor>& scores, double keep, bool across,
                                      const std::optional<std::vector<Tensor>>& weights) {
    return weights ? select<Format, true>(scores, keep, across, weights)
                   : select<Format, false>(scores, keep, across, weights);
}

std::tuple<Tensor, Tensor> keep_threshold_op(std::vector<Tensor> scores, double keep, bool across,
                                             std::optional<std::vector<Tensor>> weights) {
    check_arguments(scores, keep, weights);
    const torch::stable::accelerator::DeviceGuard guard(scores[0].get_device_index());
    switch (scores[0].scalar_type()) {
        case ScalarType::Float: return select_any<radix_select::Float32>(scores, keep, across, weights);
        case ScalarType::Double: return select_any<radix_select::Float64>(scores, keep, across, weights);
        case ScalarType::Half: return select_any<radix_select::Float16>(scores, keep, across, weights);
        case ScalarType::BFloat16: return select_any<radix_select::BFloat16>(scores, keep, across, weights);
        default:
            invalid(kOp, ": scores has dtype ", torch::headeronly::toString(scores[0].scalar_type()),
                    ", expected float32, float64, float16 or bfloat16");
    }
}

}  // namespace
}  // namespace lpaf::cuda

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CUDA, m) {
    m.impl("keep_threshold", TORCH_BOX(&lpaf::cuda::keep_threshold_op));
}
