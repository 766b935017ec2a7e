// Argument checks shared by the bindings. Messages name the argument, its value and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace lpaf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void invalid(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << '[';
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim == 0 ? "" : ", ") << tensor.size(dim);
    text << ']';
    return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
    bool same = a.dim() == b.dim();
    for (int64_t dim = 0; same && dim < a.dim(); ++dim) same = a.size(dim) == b.size(dim);
    return same;
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
    if (!same_shape(tensor, other)) {
        invalid(op, ": ", name, " has shape ", shape_of(tensor), ", expected that of ", other_name, ", ",
                shape_of(other));
    }
}

inline void check_one_element(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
    if (tensor.numel() != 1 || tensor.scalar_type() != dtype) {
        invalid(op, ": ", name, " has shape ", shape_of(tensor), " and dtype ",
                torch::headeronly::toString(tensor.scalar_type()), ", expected one element of dtype ",
                torch::headeronly::toString(dtype));
    }
}

}  // namespace lpaf
