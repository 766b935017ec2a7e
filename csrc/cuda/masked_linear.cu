// lpaf_kernels::masked_linear_weight, _grads, _pack, _packed_weight and _packed_grads for CUDA tensors.
#include "cuda/masked_linear.cuh"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/binding.h"
#include "dtype_dispatch.h"
#include "tensor_checks.h"

namespace lpaf::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <class Function>
auto dispatch(const char* op, const char* name, ScalarType dtype, const Function& function) {
    return dispatch_dtype<float, __half, __nv_bfloat16>(op, name, dtype, function);
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& other) {
    if (!tensor.is_cuda() || tensor.get_device_index() != other.get_device_index()) {
        invalid(op, ": ", name,
                " must be on the device of the other tensors, cuda:", other.get_device_index());
    }
}

// What a selection of scores is: the bindings' arguments of these names.
struct Selection {
    Tensor scores, value, tie_index;

    void check(const char* op) const {
        const bool is_double = scores.scalar_type() == ScalarType::Double;
        check_one_element(op, "value", value, is_double ? ScalarType::Double : ScalarType::Float);
        check_one_element(op, "tie_index", tie_index, ScalarType::Long);
        check_device(op, "value", value, scores);
        check_device(op, "tie_index", tie_index, scores);
    }

    void check_of(const char* op, const Tensor& weight) const {
        check_same_shape(op, "scores", scores, "weight", weight);
        check_device(op, "scores", scores, weight);
        check(op);
    }

    template <class Score>
    ThresholdMask<Score> mask() const {
        return {static_cast<const Score*>(scores.const_data_ptr()),
                static_cast<const typename ThresholdOf<Score>::type*>(value.const_data_ptr()),
                static_cast<const int64_t*>(tie_index.const_data_ptr())};
    }
};

bool all_double(std::initializer_list<ScalarType> dtypes) {
    return std::all_of(dtypes.begin(), dtypes.end(),
                       [](ScalarType dtype) { return dtype == ScalarType::Double; });
}

template <class Weight, class Out, class Mask>
void run_weight(const char* op, const Tensor& weight, const Mask& mask, const Tensor& out) {
    check_launch(op, masked_weight(static_cast<const Weight*>(weight.const_data_ptr()), mask, weight.numel(),
                                   static_cast<Out*>(out.mutable_data_ptr()),
                                   current_stream(op, weight.get_device_index())));
}

Tensor masked_linear_weight(Tensor weight, Tensor scores, Tensor value, Tensor tie_index, ScalarType dtype) {
    constexpr const char* op = "masked_linear_weight";
    const Selection selection{torch::stable::contiguous(scores), value, tie_index};
    selection.check_of(op, weight);
    const DeviceGuard guard(weight.get_device_index());
    const Tensor w = torch::stable::contiguous(weight);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    if (all_double({w.scalar_type(), scores.scalar_type(), dtype})) {
        run_weight<double, double>(op, w, selection.mask<double>(), out);
        return out;
    }
    dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch(op, "scores", scores.scalar_type(), [&](auto score_tag) {
            dispatch(op, "the result", dtype, [&](auto out_tag) {
                run_weight<typename decltype(weight_tag)::type, typename decltype(out_tag)::type>(
                    op, w, selection.mask<typename decltype(score_tag)::type>(), out);
            });
        });
    });
    return out;
}

template <class Grad, class Weight, class Score, class Mask>
void run_grads(const char* op, const Tensor& grad_weight, const Tensor& weight, const Mask& mask,
               const Tensor& d_weight, const Tensor& d_scores) {
    check_launch(op, masked_grads(static_cast<const Grad*>(grad_weight.const_data_ptr()),
                                  static_cast<const Weight*>(weight.const_data_ptr()), mask, weight.numel(),
                                  static_cast<Weight*>(d_weight.mutable_data_ptr()),
                                  static_cast<Score*>(d_scores.mutable_data_ptr()),
                                  current_stream(op, weight.get_device_index())));
}

// Calls run(grad type, weight type, scores type) for three dtypes, unmixed if one is float64.
template <class Run>
void dispatch_grads(const char* op, ScalarType grad, ScalarType weight, ScalarType scores, const Run& run) {
    if (all_double({grad, weight, scores})) {
        run(TypeTag<double>{}, TypeTag<double>{}, TypeTag<double>{});
        return;
    }
    dispatch(op, "grad_weight", grad, [&](auto grad_tag) {
        dispatch(op, "weight", weight, [&](auto weight_tag) {
            dispatch(op, "scores", scores, [&](auto score_tag) { run(grad_tag, weight_tag, score_tag); });
        });
    });
}

std::tuple<Tensor, Tensor> masked_linear_grads(Tensor grad_weight, Tensor weight, Tensor scores, Tensor value,
                                               Tensor tie_index) {
    constexpr const char* op = "masked_linear_grads";
    const Selection selection{torch::stable::contiguous(scores), value, tie_index};
    selection.check_of(op, weight);
    check_same_shape(op, "grad_weight", grad_weight, "weight", weight);
    check_device(op, "grad_weight", grad_weight, weight);
    const DeviceGuard guard(weight.get_device_index());
    const Tensor g = torch::stable::contiguous(grad_weight), w = torch::stable::contiguous(weight);
    const Tensor d_weight = torch::stable::new_empty(w, w.sizes());
    const Tensor d_scores = torch::stable::new_empty(w, w.sizes(), scores.scalar_type());
    dispatch_grads(
        op, g.scalar_type(), w.scalar_type(), scores.scalar_type(),
        [&](auto grad_tag, auto weight_tag, auto score_tag) {
            using Score = typename decltype(score_tag)::type;
            run_grads<typename decltype(grad_tag)::type, typename decltype(weight_tag)::type, Score>(
                op, g, w, selection.mask<Score>(), d_weight, d_scores);
        });
    return {d_weight, d_scores};
}

template <class Score>
void run_pack(const char* op, const Selection& selection, const Tensor& bits) {
    check_launch(op, pack_mask(selection.mask<Score>(), selection.scores.numel(),
                               static_cast<uint8_t*>(bits.mutable_data_ptr()),
                               current_stream(op, bits.get_device_index())));
}

Tensor masked_linear_pack(Tensor scores, Tensor value, Tensor tie_index) {
    constexpr const char* op = "masked_linear_pack";
    const Selection selection{torch::stable::contiguous(scores), value, tie_index};
    selection.check(op);
    const DeviceGuard guard(scores.get_device_index());
    const Tensor bits = torch::stable::new_empty(scores, {(scores.numel() + 7) / 8}, ScalarType::Byte);
    if (scores.scalar_type() == ScalarType::Double) {
        run_pack<double>(op, selection, bits);
        return bits;
    }
    dispatch(op, "scores", scores.scalar_type(),
             [&](auto score_tag) { run_pack<typename decltype(score_tag)::type>(op, selection, bits); });
    return bits;
}

void check_bits(const char* op, const Tensor& weight, const Tensor& bits, int64_t rows, int64_t cols) {
    const auto divides = [](int64_t parts, int64_t size) {
        return parts == size || (parts > 0 && parts < size && size % parts == 0);
    };
    if (weight.dim() != 2 || !divides(rows, weight.size(0)) || !divides(cols, weight.size(1))) {
        invalid(op, ": rows and cols are ", rows, " and ", cols,
                ", expected divisors of the shape of weight, ", shape_of(weight));
    }
    if (std::max(weight.size(0), weight.size(1)) > std::numeric_limits<int>::max()) {
        invalid(op, ": weight has shape ", shape_of(weight), ", expected sides below 2^31");
    }
    if (bits.scalar_type() != ScalarType::Byte || bits.dim() != 1 || bits.size(0) != (rows * cols + 7) / 8) {
        invalid(op, ": bits has shape ", shape_of(bits), " and dtype ",
                torch::headeronly::toString(bits.scalar_type()), ", expected ", (rows * cols + 7) / 8,
                " bytes");
    }
    check_device(op, "bits", bits, weight);
}

template <class Weight, class Out>
void run_packed_weight(const char* op, const Tensor& weight, const Tensor& bits, int64_t rows, int64_t cols,
                       const Tensor& out) {
    const BitMask mask{static_cast<const uint8_t*>(bits.const_data_ptr())};
    if (weight.numel() == rows * cols) {
        run_weight<Weight, Out>(op, weight, mask, out);
        return;
    }
    const int64_t height = weight.size(0), width = weight.size(1);
    const BlockMask blocks{mask.bits, static_cast<int>(height), static_cast<int>(width),
                           static_cast<int>(height / rows), static_cast<int>(width / cols)};
    check_launch(op, masked_blocks(static_cast<const Weight*>(weight.const_data_ptr()), blocks,
                                   static_cast<Out*>(out.mutable_data_ptr()),
                                   current_stream(op, weight.get_device_index())));
}

Tensor masked_linear_packed_weight(Tensor weight, Tensor bits, int64_t rows, int64_t cols, ScalarType dtype) {
    constexpr const char* op = "masked_linear_packed_weight";
    check_bits(op, weight, bits, rows, cols);
    const DeviceGuard guard(weight.get_device_index());
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bits);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    if (all_double({w.scalar_type(), dtype})) {
        run_packed_weight<double, double>(op, w, b, rows, cols, out);
        return out;
    }
    dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch(op, "the result", dtype, [&](auto out_tag) {
            run_packed_weight<typename decltype(weight_tag)::type, typename decltype(out_tag)::type>(
                op, w, b, rows, cols, out);
        });
    });
    return out;
}

// Of one bit per weight; sums over blocks are torch's.
std::tuple<Tensor, Tensor> masked_linear_packed_grads(Tensor grad_weight, Tensor weight, Tensor bits,
                                                      int64_t rows, int64_t cols, ScalarType scores_dtype) {
    constexpr const char* op = "masked_linear_packed_grads";
    check_bits(op, weight, bits, rows, cols);
    if (rows != weight.size(0) || cols != weight.size(1)) {
        invalid(op, ": rows and cols are ", rows, " and ", cols, ", expected the shape of weight on CUDA, ",
                shape_of(weight));
    }
    check_same_shape(op, "grad_weight", grad_weight, "weight", weight);
    check_device(op, "grad_weight", grad_weight, weight);
    const DeviceGuard guard(weight.get_device_index());
    const Tensor g = torch::stable::contiguous(grad_weight), w = torch::stable::contiguous(weight),
                 b = torch::stable::contiguous(bits);
    const Tensor d_weight = torch::stable::new_empty(w, w.sizes());
    const Tensor d_scores = torch::stable::new_empty(w, w.sizes(), scores_dtype);
    const BitMask mask{static_cast<const uint8_t*>(b.const_data_ptr())};
    dispatch_grads(op, g.scalar_type(), w.scalar_type(), scores_dtype,
                   [&](auto grad_tag, auto weight_tag, auto score_tag) {
                       run_grads<typename decltype(grad_tag)::type, typename decltype(weight_tag)::type,
                                 typename decltype(score_tag)::type>(op, g, w, mask, d_weight, d_scores);
                   });
    return {d_weight, d_scores};
}

}  // namespace
}  // namespace lpaf::cuda

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CUDA, m) {
    m.impl("masked_linear_weight", TORCH_BOX(&lpaf::cuda::masked_linear_weight));
    m.impl("masked_linear_grads", TORCH_BOX(&lpaf::cuda::masked_linear_grads));
    m.impl("masked_linear_pack", TORCH_BOX(&lpaf::cuda::masked_linear_pack));
    m.impl("masked_linear_packed_weight", TORCH_BOX(&lpaf::cuda::masked_linear_packed_weight));
    m.impl("masked_linear_packed_grads", TORCH_BOX(&lpaf::cuda::masked_linear_packed_grads));
}
