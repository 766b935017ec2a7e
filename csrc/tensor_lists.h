// Lists of tensors as arguments of an operator: their checks, and contiguous copies of strided ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype_dispatch.h"
#include "tensor_checks.h"

namespace lpaf {

using TensorList = std::vector<Tensor>;

// float64 for float64 matrices, else float32: what sums and averages over matrices of `dtype` are kept in.
inline ScalarType state_dtype(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `list` has one tensor per matrix, of one dtype, on the device of weights[0].
inline void check_list(const char* op, const char* name, const TensorList& list, const TensorList& weights,
                       ScalarType dtype) {
    if (list.size() != weights.size()) {
        invalid(op, ": ", name, " has ", list.size(), " tensors, expected one per matrix of weights, ",
                weights.size());
    }
    for (std::size_t i = 0; i < list.size(); ++i) {
        if (list[i].scalar_type() != dtype) {
            invalid(op, ": ", name, "[", i, "] has dtype ",
                    torch::headeronly::toString(list[i].scalar_type()), ", expected ",
                    torch::headeronly::toString(dtype));
        }
        if (list[i].is_cpu() != weights[0].is_cpu() || list[i].is_cuda() != weights[0].is_cuda() ||
            list[i].get_device_index() != weights[0].get_device_index()) {
            invalid(op, ": ", name, "[", i, "] is not on the device of weights[0]");
        }
    }
}

enum class Shape { kMatrix, kRows, kEither };

// `list` has tensors of the shapes of the matrices, or with one entry per row of each.
inline void check_shapes(const char* op, const char* name, const TensorList& list, const TensorList& weights,
                         Shape shape) {
    for (std::size_t i = 0; i < list.size(); ++i) {
        const bool is_matrix = same_shape(list[i], weights[i]);
        const bool is_rows = list[i].dim() == 1 && list[i].size(0) == weights[i].size(0);
        if ((is_matrix && shape != Shape::kRows) || (is_rows && shape != Shape::kMatrix)) continue;
        invalid(op, ": ", name, "[", i, "] has shape ", shape_of(list[i]), ", expected that of weights[", i,
                "], ", shape_of(weights[i]), shape == Shape::kMatrix ? "" : ", or one entry per row");
    }
}

inline void check_weights(const char* op, const TensorList& weights) {
    if (weights.empty()) invalid(op, ": weights is an empty list, expected at least one tensor");
    check_list(op, "weights", weights, weights, weights[0].scalar_type());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        if (weights[i].dim() == 2) continue;
        invalid(op, ": weights[", i, "] has shape ", shape_of(weights[i]), ", expected [out, in]");
    }
}

// Scores or averages of the matrices, in state_dtype.
inline void check_state(const char* op, const char* name, const TensorList& list, const TensorList& weights,
                        Shape shape) {
    check_list(op, name, list, weights, state_dtype(weights[0].scalar_type()));
    check_shapes(op, name, list, weights, shape);
}

inline void check_grads(const char* op, const TensorList& grads, const TensorList& weights) {
    check_list(op, "grads", grads, weights, weights[0].scalar_type());
    check_shapes(op, "grads", grads, weights, Shape::kMatrix);
}

// One value and tie index per matrix.
inline void check_thresholds(const char* op, const TensorList& values, const TensorList& tie_indices,
                             const TensorList& weights) {
    check_list(op, "values", values, weights, state_dtype(weights[0].scalar_type()));
    check_list(op, "tie_indices", tie_indices, weights, ScalarType::Long);
    for (const auto& [name, list] : {std::pair{"values", &values}, std::pair{"tie_indices", &tie_indices}}) {
        for (std::size_t i = 0; i < list->size(); ++i) {
            if ((*list)[i].numel() == 1) continue;
            invalid(op, ": ", name, "[", i, "] has shape ", shape_of((*list)[i]), ", expected one element");
        }
    }
}

// Calls function(TypeTag<T>{}) with the type of matrices of `dtype`.
template <class Half, class BFloat16, class Function>
void dispatch_matrices(const char* op, ScalarType dtype, const Function& function) {
    if (dtype == ScalarType::Double) {
        function(TypeTag<double>{});
    } else {
        dispatch_dtype<float, Half, BFloat16>(op, "weights", dtype, function);
    }
}

// A list whose tensors a kernel reads, or writes, as contiguous memory.
class ContiguousList {
  public:
    explicit ContiguousList(TensorList tensors) : tensors_(std::move(tensors)) {
        for (const Tensor& tensor : tensors_) contiguous_.push_back(torch::stable::contiguous(tensor));
    }

    template <class T>
    std::vector<const T*> read() const {
        std::vector<const T*> pointers;
        for (const Tensor& tensor : contiguous_) {
            pointers.push_back(static_cast<const T*>(tensor.const_data_ptr()));
        }
        return pointers;
    }

    template <class T>
    std::vector<T*> write() const {
        std::vector<T*> pointers;
        for (const Tensor& tensor : contiguous_)
            pointers.push_back(static_cast<T*>(tensor.mutable_data_ptr()));
        return pointers;
    }

    // What was written to copies goes to the tensors that they are copies of.
    void write_back() {
        for (std::size_t i = 0; i < tensors_.size(); ++i) {
            if (!tensors_[i].is_contiguous()) torch::stable::copy_(tensors_[i], contiguous_[i]);
        }
    }

  private:
    TensorList tensors_, contiguous_;
};

}  // namespace lpaf
