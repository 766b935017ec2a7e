// lpaf_kernels::masked_linear_weight for CUDA tensors.
#include "cuda/masked_linear.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/binding.h"
#include "dtype_dispatch.h"
#include "tensor_checks.h"

namespace lpaf::cuda {
namespace {

constexpr const char* kOp = "masked_linear_weight";

template <class Function>
auto dispatch(const char* name, ScalarType dtype, const Function& function) {
    return dispatch_dtype<float, __half, __nv_bfloat16>(kOp, name, dtype, function);
}

void check_arguments(const Tensor& weight, const Tensor& scores, const Tensor& value,
                     const Tensor& tie_index) {
    check_same_shape(kOp, "scores", scores, "weight", weight);
    const bool is_double = scores.scalar_type() == ScalarType::Double;
    check_one_element(kOp, "value", value, is_double ? ScalarType::Double : ScalarType::Float);
    check_one_element(kOp, "tie_index", tie_index, ScalarType::Long);
    for (const Tensor* tensor : {&scores, &value, &tie_index}) {
        if (!tensor->is_cuda() || tensor->get_device_index() != weight.get_device_index()) {
            invalid(kOp, ": scores, value and tie_index must be on the device of weight, cuda:",
                    weight.get_device_index());
        }
    }
}

template <class Weight, class Score, class Out>
void run(const Tensor& weight, const Tensor& scores, const Tensor& value, const Tensor& tie_index,
         const Tensor& out) {
    using Value = typename ThresholdOf<Score>::type;
    const cudaError_t error = masked_weight(
        static_cast<const Weight*>(weight.const_data_ptr()),
        static_cast<const Score*>(scores.const_data_ptr()), static_cast<const Value*>(value.const_data_ptr()),
        static_cast<const int64_t*>(tie_index.const_data_ptr()), weight.numel(),
        static_cast<Out*>(out.mutable_data_ptr()), current_stream(kOp, weight.get_device_index()));
    check_launch(kOp, error);
}

Tensor masked_linear_weight(Tensor weight, Tensor scores, Tensor value, Tensor tie_index, ScalarType dtype) {
    check_arguments(weight, scores, value, tie_index);
    const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
    const Tensor w = torch::stable::contiguous(weight), s = torch::stable::contiguous(scores);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    if (w.scalar_type() == ScalarType::Double && s.scalar_type() == ScalarType::Double &&
        dtype == ScalarType::Double) {
        run<double, double, double>(w, s, value, tie_index, out);
        return out;
    }
    dispatch("weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch("scores", s.scalar_type(), [&](auto score_tag) {
            dispatch("the result", dtype, [&](auto out_tag) {
                run<typename decltype(weight_tag)::type, typename decltype(score_tag)::type,
                    typename decltype(out_tag)::type>(w, s, value, tie_index, out);
            });
        });
    });
    return out;
}

}  // namespace
}  // namespace lpaf::cuda

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CUDA, m) {
    m.impl("masked_linear_weight", TORCH_BOX(&lpaf::cuda::masked_linear_weight));
}
