// torch's own matrix products of CPU tensors, through the C functions that it keeps stable: no operator is
// looked up by name, and nothing is recorded for autograd.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_checks.h"

namespace lpaf::cpu {

// Uninitialised and contiguous, of a dtype as the shim numbers them, see dtype_of.
inline Tensor empty(const std::vector<int64_t>& shape, int32_t dtype) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t dim = shape.size(); dim-- > 1;) {
        strides[dim - 1] = strides[dim] * std::max<int64_t>(1, shape[dim]);
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                           strides.data(), dtype,
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

inline int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

// A view that begins `offset` entries after `tensor` does.
inline Tensor view(const Tensor& tensor, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides, int64_t offset = 0) {
    AtenTensorHandle handle;
    // The offset counts from where the tensor begins, not from its storage.
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
        tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &handle));
    return Tensor(handle);
}

// A [rows, columns] view that begins where `tensor` does.
inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride = 1) {
    return view(tensor, {rows, columns}, {row_stride, column_stride});
}

inline Tensor transposed(const Tensor& tensor) {
    return matrix(tensor, tensor.size(1), tensor.size(0), tensor.stride(1), tensor.stride(0));
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = a b + bias, bias one row
inline void multiply_add(const Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace lpaf::cpu
