// Scalar types on the GPU: widening to float or double and back. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/pack.cuh"

namespace lpaf::cuda {

__device__ inline float widen(float value) {
    return value;
}
__device__ inline double widen(double value) {
    return value;
}
__device__ inline float widen(__half value) {
    return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <class To>
__device__ To narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
    return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <class To>
__device__ To narrow(double value) {
    return static_cast<To>(value);
}

// The type that `value` has for scores of type Score.
template <class Score>
struct ThresholdOf {
    using type = float;
};
template <>
struct ThresholdOf<double> {
    using type = double;
};

}  // namespace lpaf::cuda
