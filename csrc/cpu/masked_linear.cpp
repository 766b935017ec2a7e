// lpaf_kernels::masked_linear_weight and masked_linear_grads for CPU tensors.
#include "cpu/masked_linear.h"

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dispatch.h"
#include "dtype_dispatch.h"
#include "tensor_checks.h"

namespace lpaf::cpu {
namespace {

// Entries per parallel task at least: below this, starting threads costs more than the work.
constexpr int64_t kGrain = 1 << 15;

template <class Function>
auto dispatch(const char* op, const char* name, ScalarType dtype, const Function& function) {
    return dispatch_dtype<float, Half, BFloat16>(op, name, dtype, function);
}

// The functions below exist once per instruction set and combination of types.
template <class Weight, class Score, class Out>
LPAF_MULTIVERSION void weight_range(const Weight* weight, const Score* scores, Wide<Score> value,
                                    int64_t tie_index, int64_t size, Out* out) {
    masked_weight(weight, scores, value, tie_index, size, out);
}

template <class Grad, class Weight, class Score>
LPAF_MULTIVERSION void grads_range(const Grad* grad, const Weight* weight, const Score* scores,
                                   Wide<Score> value, int64_t tie_index, int64_t size, Weight* d_weight,
                                   Score* d_scores) {
    masked_grads(grad, weight, scores, value, tie_index, size, d_weight, d_scores);
}

struct Mask {
    Tensor value, tie_index;
};

void check_mask(const char* op, const Tensor& weight, const Tensor& scores, const Mask& mask) {
    check_same_shape(op, "scores", scores, "weight", weight);
    const bool is_double = scores.scalar_type() == ScalarType::Double;
    check_one_element(op, "value", mask.value, is_double ? ScalarType::Double : ScalarType::Float);
    check_one_element(op, "tie_index", mask.tie_index, ScalarType::Long);
    if (!weight.is_cpu() || !scores.is_cpu() || !mask.value.is_cpu() || !mask.tie_index.is_cpu()) {
        invalid(op, ": weight, scores, value and tie_index must all be on the CPU");
    }
}

template <class Weight, class Score, class Out>
void run_weight(const Tensor& weight, const Tensor& scores, const Mask& mask, const Tensor& out) {
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    const auto* score = static_cast<const Score*>(scores.const_data_ptr());
    auto* result = static_cast<Out*>(out.mutable_data_ptr());
    const auto value = *static_cast<const Wide<Score>*>(mask.value.const_data_ptr());
    const auto tie_index = *static_cast<const int64_t*>(mask.tie_index.const_data_ptr());
    torch::stable::parallel_for(0, weight.numel(), kGrain, [=](int64_t begin, int64_t end) {
        weight_range(weights + begin, score + begin, value, tie_index - begin, end - begin, result + begin);
    });
}

Tensor masked_linear_weight(Tensor weight, Tensor scores, Tensor value, Tensor tie_index, ScalarType dtype) {
    constexpr const char* op = "masked_linear_weight";
    const Mask mask{value, tie_index};
    check_mask(op, weight, scores, mask);
    const Tensor w = torch::stable::contiguous(weight), s = torch::stable::contiguous(scores);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    if (w.scalar_type() == ScalarType::Double && s.scalar_type() == ScalarType::Double &&
        dtype == ScalarType::Double) {
        run_weight<double, double, double>(w, s, mask, out);
        return out;
    }
    dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch(op, "scores", s.scalar_type(), [&](auto score_tag) {
            dispatch(op, "the result", dtype, [&](auto out_tag) {
                run_weight<typename decltype(weight_tag)::type, typename decltype(score_tag)::type,
                           typename decltype(out_tag)::type>(w, s, mask, out);
            });
        });
    });
    return out;
}

template <class Grad, class Weight, class Score>
void run_grads(const Tensor& grad_weight, const Tensor& weight, const Tensor& scores, const Mask& mask,
               const Tensor& d_weight, const Tensor& d_scores) {
    const auto* grad = static_cast<const Grad*>(grad_weight.const_data_ptr());
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    const auto* score = static_cast<const Score*>(scores.const_data_ptr());
    auto* to_weight = static_cast<Weight*>(d_weight.mutable_data_ptr());
    auto* to_scores = static_cast<Score*>(d_scores.mutable_data_ptr());
    const auto value = *static_cast<const Wide<Score>*>(mask.value.const_data_ptr());
    const auto tie_index = *static_cast<const int64_t*>(mask.tie_index.const_data_ptr());
    torch::stable::parallel_for(0, weight.numel(), kGrain, [=](int64_t begin, int64_t end) {
        grads_range(grad + begin, weights + begin, score + begin, value, tie_index - begin, end - begin,
                    to_weight + begin, to_scores + begin);
    });
}

std::tuple<Tensor, Tensor> masked_linear_grads(Tensor grad_weight, Tensor weight, Tensor scores, Tensor value,
                                               Tensor tie_index) {
    constexpr const char* op = "masked_linear_grads";
    const Mask mask{value, tie_index};
    check_mask(op, weight, scores, mask);
    check_same_shape(op, "grad_weight", grad_weight, "weight", weight);
    if (!grad_weight.is_cpu()) invalid(op, ": grad_weight must be on the CPU like weight");
    const Tensor g = torch::stable::contiguous(grad_weight), w = torch::stable::contiguous(weight),
                 s = torch::stable::contiguous(scores);
    const Tensor d_weight = torch::stable::new_empty(w, w.sizes());
    const Tensor d_scores = torch::stable::new_empty(s, s.sizes());
    if (g.scalar_type() == ScalarType::Double && w.scalar_type() == ScalarType::Double &&
        s.scalar_type() == ScalarType::Double) {
        run_grads<double, double, double>(g, w, s, mask, d_weight, d_scores);
        return {d_weight, d_scores};
    }
    dispatch(op, "grad_weight", g.scalar_type(), [&](auto grad_tag) {
        dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
            dispatch(op, "scores", s.scalar_type(), [&](auto score_tag) {
                run_grads<typename decltype(grad_tag)::type, typename decltype(weight_tag)::type,
                          typename decltype(score_tag)::type>(g, w, s, mask, d_weight, d_scores);
            });
        });
    });
    return {d_weight, d_scores};
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("masked_linear_weight", TORCH_BOX(&lpaf::cpu::masked_linear_weight));
    m.impl("masked_linear_grads", TORCH_BOX(&lpaf::cpu::masked_linear_grads));
}
