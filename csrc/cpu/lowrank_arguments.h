// The tensors of a low-rank layer as the bindings take them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/lowrank_sparse_linear.h"
#include "tensor_checks.h"

namespace lpaf::cpu {

// torch::stable::contiguous and new_empty look their operators up by name, which costs a small layer its
// lead.
inline Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline const float* floats(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
}

inline void check_matrix(const char* op, const char* name, const Tensor& tensor) {
    if (tensor.dim() != 2)
        invalid(op, ": ", name, " has shape ", shape_of(tensor), ", expected two dimensions");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
    if (tensor.scalar_type() != expected || !tensor.is_cpu()) {
        invalid(op, ": ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                ", expected ", torch::headeronly::toString(expected), " on the CPU");
    }
}

inline KeptColumns kept_columns(const char* op, const Tensor& kept, int64_t out) {
    KeptColumns columns;
    columns.size = kept.numel();
    if (kept.dim() != 1 || !kept.is_cpu()) {
        invalid(op, ": kept has shape ", shape_of(kept), ", expected one dimension on the CPU");
    }
    if (kept.scalar_type() == ScalarType::Int) {
        columns.as_int32 = static_cast<const int32_t*>(kept.const_data_ptr());
    } else if (kept.scalar_type() == ScalarType::Long) {
        columns.as_int64 = static_cast<const int64_t*>(kept.const_data_ptr());
    } else {
        invalid(op, ": kept has dtype ", torch::headeronly::toString(kept.scalar_type()),
                ", expected int32 or int64");
    }
    int64_t previous = -1;
    for (int64_t j = 0; j < columns.size; ++j) {
        if (columns[j] <= previous || columns[j] >= out) {
            invalid(op, ": kept[", j, "] is ", columns[j], " after ", previous,
                    ", expected sorted unique positions in [0, ", out, ")");
        }
        previous = columns[j];
    }
    return columns;
}

// A low-rank layer's arguments, checked and contiguous, and the layer that points to them.
struct Arguments {
    Tensor x, down, up;
    std::optional<Tensor> kept, bias;
    ScalarType dtype;
    LowRankSparseLayer layer;   // its pointers are those of float32
    std::vector<int64_t> lead;  // all dimensions of x but the last
    int64_t rows = 1;           // their product

    Arguments(const char* op, const Tensor& x_, const Tensor& down_, const Tensor& up_,
              const std::optional<Tensor>& kept_, const std::optional<Tensor>& bias_)
        : x(as_contiguous(x_)), down(as_contiguous(down_)), up(as_contiguous(up_)), kept(kept_), bias(bias_) {
        dtype = x.scalar_type();
        if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
            invalid(op, ": x has dtype ", torch::headeronly::toString(dtype),
                    ", expected float32, bfloat16 or float16");
        }
        check_dtype(op, "x", x, dtype);
        check_dtype(op, "down", down, dtype);
        check_dtype(op, "up", up, dtype);
        check_matrix(op, "down", down);
        check_matrix(op, "up", up);
        layer = {down.size(1), up.size(0), up.size(1), floats(down), floats(up), nullptr, {}};
        if (kept) {
            kept = as_contiguous(*kept);
            layer.kept = kept_columns(op, *kept, layer.out);
        }
        if (bias) {
            check_dtype(op, "bias", *bias, dtype);
            if (bias->dim() != 1 || bias->size(0) != layer.out) {
                invalid(op, ": bias has shape ", shape_of(*bias), ", expected [", layer.out, "]");
            }
            bias = as_contiguous(*bias);
            layer.bias = floats(*bias);
        }
        if (x.dim() == 0 || x.size(-1) != layer.in) {
            invalid(op, ": x has shape ", shape_of(x), ", expected last dimension ", layer.in);
        }
        if (down.size(0) != layer.columns()) {
            invalid(op, ": down has shape ", shape_of(down), ", expected ", layer.columns(), " rows");
        }
        for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
            lead.push_back(x.size(dim));
            rows *= x.size(dim);
        }
    }
    Arguments(const Arguments&) = delete;
    Arguments(Arguments&&) = default;  // the tensors move along, and with them what is pointed to

    std::vector<int64_t> with_last(int64_t size) const {
        std::vector<int64_t> shape = lead;
        shape.push_back(size);
        return shape;
    }
};

}  // namespace lpaf::cpu
