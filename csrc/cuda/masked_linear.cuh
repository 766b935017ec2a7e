// Masked weight on the GPU. No torch. Entry i is kept if score > value, or score == value and i < tie_index.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/scalar_types.cuh"

namespace lpaf::cuda {

// out = kept ? weight : 0, by packs of kWidth entries; the entries after the last whole pack one by one.
template <class Weight, class Score, class Out, int kWidth>
__global__ void __launch_bounds__(256)
    masked_weight_kernel(const Weight* __restrict__ weight, const Score* __restrict__ scores,
                         const typename ThresholdOf<Score>::type* __restrict__ value_ptr,
                         const int64_t* __restrict__ tie_index_ptr, int64_t size, Out* __restrict__ out) {
    const auto value = *value_ptr;
    const int64_t tie_index = *tie_index_ptr;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const auto masked = [&](Weight entry, Score raw_score, int64_t i) {
        const auto score = widen(raw_score);
        const bool kept = score > value || (score == value && i < tie_index);
        const auto wide = widen(entry);
        return narrow<Out>(kept ? wide : decltype(wide){0});
    };

    const int64_t packs = size / kWidth;
    for (int64_t pack = thread; pack < packs; pack += step) {
        const auto w = reinterpret_cast<const Pack<Weight, kWidth>*>(weight)[pack];
        const auto s = reinterpret_cast<const Pack<Score, kWidth>*>(scores)[pack];
        Pack<Out, kWidth> result;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            result.entries[j] = masked(w.entries[j], s.entries[j], pack * kWidth + j);
        }
        reinterpret_cast<Pack<Out, kWidth>*>(out)[pack] = result;
    }
    for (int64_t i = packs * kWidth + thread; i < size; i += step) out[i] = masked(weight[i], scores[i], i);
}

// Launch on `stream` of the current device. Loads and stores of the widest type are 16 bytes where all three
// arrays are aligned for that. `value` and `tie_index` are device pointers, so nothing waits for the GPU.
template <class Weight, class Score, class Out>
cudaError_t masked_weight(const Weight* weight, const Score* scores,
                          const typename ThresholdOf<Score>::type* value, const int64_t* tie_index,
                          int64_t size, Out* out, cudaStream_t stream) {
    constexpr int kThreads = 256;
    constexpr int kBlocksPerProcessor = 8;
    constexpr int kWidth = static_cast<int>(16 / std::max({sizeof(Weight), sizeof(Score), sizeof(Out)}));
    if (size == 0) return cudaSuccess;

    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;

    const auto aligned = [](const auto* pointer) {
        return reinterpret_cast<std::uintptr_t>(pointer) % (sizeof(*pointer) * kWidth) == 0;
    };
    const bool packed = aligned(weight) && aligned(scores) && aligned(out);
    const int64_t work = packed ? (size + kWidth - 1) / kWidth : size;
    const int64_t blocks = std::min<int64_t>((work + kThreads - 1) / kThreads,
                                             static_cast<int64_t>(processors) * kBlocksPerProcessor);
    const auto kernel = packed ? &masked_weight_kernel<Weight, Score, Out, kWidth>
                               : &masked_weight_kernel<Weight, Score, Out, 1>;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(weight, scores, value, tie_index, size,
                                                                   out);
    return cudaGetLastError();
}

}  // namespace lpaf::cuda
