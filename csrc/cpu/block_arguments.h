// What the bindings of whole blocks take beside their layers.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "cpu/elementwise.h"
#include "cpu/lowrank_arguments.h"
#include "cpu/parallel.h"

namespace lpaf::cpu {

inline const ElementwiseKernels& elementwise_kernels() {
    static const ElementwiseKernels& chosen =
#if defined(__x86_64__)
        for_this_processor(kBaselineElementwise, kAvx2Elementwise, kAvx512Elementwise);
#else
        kBaselineElementwise;
#endif
    return chosen;
}

// A contiguous vector of `size` floats, or nothing.
inline std::optional<Tensor> optional_row(const char* op, const char* name,
                                          const std::optional<Tensor>& tensor, int64_t size) {
    if (!tensor) return std::nullopt;
    check_dtype(op, name, *tensor, ScalarType::Float);
    if (tensor->dim() != 1 || tensor->size(0) != size) {
        invalid(op, ": ", name, " has shape ", shape_of(*tensor), ", expected [", size, "]");
    }
    return as_contiguous(*tensor);
}

// The residual and the normalisation of a result's rows, checked and contiguous, and the Norm that points to
// them.
struct Ending {
    std::optional<Tensor> residual, weight, bias;
    Norm norm;

    Ending(const char* op, const Tensor& y, const std::optional<Tensor>& residual_,
           const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, const std::string& kind,
           double epsilon)
        : weight(optional_row(op, "norm_weight", weight_, y.size(-1))),
          bias(optional_row(op, "norm_bias", bias_, y.size(-1))) {
        if (residual_) {
            check_dtype(op, "residual", *residual_, ScalarType::Float);
            check_same_shape(op, "residual", *residual_, "the result", y);
            residual = as_contiguous(*residual_);
        }
        if (kind == "layer") {
            norm.kind = Norm::Kind::kLayer;
        } else if (kind == "rms") {
            norm.kind = Norm::Kind::kRms;
        } else if (kind != "none") {
            invalid(op, ": norm is ", kind, ", expected none, layer or rms");
        }
        if (norm.kind != Norm::Kind::kNone && !weight) invalid(op, ": norm_weight is missing");
        norm.epsilon = static_cast<float>(epsilon);
        if (weight) norm.weight = floats(*weight);
        if (bias) norm.bias = floats(*bias);
    }
    Ending(const Ending&) = delete;

    // Row `row` of y is the layer's result, and becomes the block's.
    void finish(int64_t row, float* y, int64_t size) const {
        const float* from = residual ? floats(*residual) + row * size : nullptr;
        elementwise_kernels().normalise(norm, from, y, size);
    }
};

}  // namespace lpaf::cpu
