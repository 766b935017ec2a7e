// What the bindings of whole blocks take beside their layers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/elementwise.h"
#include "cpu/lowrank_arguments.h"
#include "cpu/parallel.h"
#include "cpu/torch_products.h"

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

// The rows of a block are float32 or bfloat16; its sums and everything between its layers are float32.
inline void check_block_dtype(const char* op, const Tensor& x) {
    if (x.dim() == 0) invalid(op, ": x has shape [], expected at least one dimension");
    if (!x.is_cpu() || (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::BFloat16)) {
        invalid(op, ": x has dtype ", torch::headeronly::toString(x.scalar_type()),
                ", expected float32 or bfloat16 on the CPU");
    }
}

// A parameter of dtype `dtype` as contiguous float32.
inline Tensor widened(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
    check_dtype(op, name, tensor, dtype);
    const Tensor from = as_contiguous(tensor);
    if (dtype == ScalarType::Float) return from;
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim < from.dim(); ++dim) shape.push_back(from.size(dim));
    const Tensor to = empty(shape, aoti_torch_dtype_float32());
    const auto* entries = static_cast<const uint16_t*>(from.const_data_ptr());
    auto* floats = static_cast<float*>(to.mutable_data_ptr());
    // As cheap as a few multiplications each.
    share_out(from.numel(), 64, 4, [&](int64_t begin, int64_t end) {
        elementwise_kernels().widen(entries + begin, floats + begin, end - begin);
    });
    return to;
}

inline std::optional<Tensor> widened(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                     ScalarType dtype) {
    if (!tensor) return std::nullopt;
    return widened(op, name, *tensor, dtype);
}

// A layer's arguments of dtype `dtype` for `inputs` features, as float32. They are checked against an input
// that is never made.
inline Arguments widened_layer(const char* op, ScalarType dtype, int64_t inputs, const Tensor& down,
                               const Tensor& up, const std::optional<Tensor>& kept,
                               const std::optional<Tensor>& bias) {
    const Tensor factor = widened(op, "down", down, dtype);
    return Arguments(op, matrix(factor, 0, inputs, inputs), factor, widened(op, "up", up, dtype), kept,
                     widened(op, "bias", bias, dtype));
}

// The shape of x with another last dimension.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t size) {
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
    shape.push_back(size);
    return shape;
}

// Rows of x or of the residual.
class Input {
  public:
    explicit Input(const Tensor& tensor)
        : tensor_(as_contiguous(tensor)),
          narrow_(tensor_.scalar_type() == ScalarType::BFloat16),
          columns_(tensor_.size(-1)) {
        for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) count_ *= tensor.size(dim);
    }

    int64_t count() const { return count_; }

    // Floats that `rows` takes to work in.
    int64_t room(int64_t rows) const { return narrow_ ? rows * columns_ : 0; }

    // The rows [begin, end), contiguous; in `room` unless they are floats already.
    const float* rows(int64_t begin, int64_t end, float* room) const {
        if (!narrow_) return floats(tensor_) + begin * columns_;
        const auto* entries = static_cast<const uint16_t*>(tensor_.const_data_ptr());
        elementwise_kernels().widen(entries + begin * columns_, room, (end - begin) * columns_);
        return room;
    }

  private:
    Tensor tensor_;
    bool narrow_;
    int64_t columns_, count_ = 1;
};

// A contiguous vector of `size` floats, or nothing. Norms are often float32 where all else is bfloat16.
inline std::optional<Tensor> optional_row(const char* op, const char* name,
                                          const std::optional<Tensor>& tensor, int64_t size) {
    if (!tensor) return std::nullopt;
    if (tensor->dim() != 1 || tensor->size(0) != size) {
        invalid(op, ": ", name, " has shape ", shape_of(*tensor), ", expected [", size, "]");
    }
    const bool narrow = tensor->scalar_type() == ScalarType::BFloat16;
    return widened(op, name, *tensor, narrow ? ScalarType::BFloat16 : ScalarType::Float);
}

// How a block's rows end: residual, normalisation, and where they are written.
class Ending {
  public:
    Ending(const char* op, const Tensor& y, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::string& kind,
           double epsilon)
        : y_(y),
          narrow_(y.scalar_type() == ScalarType::BFloat16),
          columns_(y.size(-1)),
          weight_(optional_row(op, "norm_weight", weight, columns_)),
          bias_(optional_row(op, "norm_bias", bias, columns_)) {
        if (residual) {
            check_dtype(op, "residual", *residual, y.scalar_type());
            check_same_shape(op, "residual", *residual, "the result", y);
            residual_.emplace(*residual);
        }
        if (kind == "layer") {
            norm_.kind = Norm::Kind::kLayer;
        } else if (kind == "rms") {
            norm_.kind = Norm::Kind::kRms;
        } else if (kind != "none") {
            invalid(op, ": norm is ", kind, ", expected none, layer or rms");
        }
        if (norm_.kind != Norm::Kind::kNone && !weight_) invalid(op, ": norm_weight is missing");
        norm_.epsilon = static_cast<float>(epsilon);
        if (weight_) norm_.weight = floats(*weight_);
        if (bias_) norm_.bias = floats(*bias_);
    }
    Ending(const Ending&) = delete;

    // Floats that `rows` and `finish` take to work in.
    int64_t room(int64_t rows) const { return narrow_ ? (rows + 1) * columns_ : 0; }

    // Where the last layer's results of the rows from `begin` on go, contiguous.
    float* rows(int64_t begin, float* room) const {
        return narrow_ ? room + columns_ : static_cast<float*>(y_.mutable_data_ptr()) + begin * columns_;
    }

    // Makes those results the block's.
    void finish(int64_t begin, int64_t end, float* room) const {
        float* row = rows(begin, room);
        for (int64_t i = begin; i < end; ++i, row += columns_) {
            const float* residual = residual_ ? residual_->rows(i, i + 1, room) : nullptr;
            elementwise_kernels().normalise(norm_, residual, row, columns_);
            if (narrow_) {
                auto* to = static_cast<uint16_t*>(y_.mutable_data_ptr()) + i * columns_;
                elementwise_kernels().narrow(row, to, columns_);
            }
        }
    }

  private:
    Tensor y_;
    bool narrow_;
    int64_t columns_;
    std::optional<Tensor> weight_, bias_;
    std::optional<Input> residual_;
    Norm norm_;
};

}  // namespace lpaf::cpu
