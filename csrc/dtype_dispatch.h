// From a run-time dtype to a compile-time type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "tensor_checks.h"

namespace lpaf {

template <class T>
struct TypeTag {
    using type = T;
};

// Calls function(TypeTag<T>{}) with the type for `dtype` of float32, float16 and bfloat16.
template <class Float, class Half, class BFloat16, class Function>
auto dispatch_dtype(const char* op, const char* name, ScalarType dtype, const Function& function) {
    switch (dtype) {
        case ScalarType::Float: return function(TypeTag<Float>{});
        case ScalarType::Half: return function(TypeTag<Half>{});
        case ScalarType::BFloat16: return function(TypeTag<BFloat16>{});
        default:
            invalid(op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                    ", expected float32, float16 or bfloat16, or float64 for every tensor");
    }
}

}  // namespace lpaf
