// Element-wise halves of masked_linear on the GPU: the masked weight, the gradients of weight and scores, and
// masks of bits. No torch. Entry i is kept if score > value, or score == value and i < tie_index; a mask of
// bits holds that for entry i in bit i % 8, the lowest first, of byte i / 8.
#pragma once

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/scalar_types.cuh"

namespace lpaf::cuda {

constexpr int kThreads = 256;

// Entries that a 16-byte load of the widest of some types holds.
template <class... Types>
constexpr int kPackWidth = static_cast<int>(16 / std::max({sizeof(Types)...}));

template <int kWidth>
struct Flags {
    bool kept[kWidth];
};

// The mask of a selection of scores, one per weight. `value` and `tie_index` are device pointers, so nothing
// waits for the GPU.
template <class Score>
struct ThresholdMask {
    using Entry = Score;
    using Value = typename ThresholdOf<Score>::type;

    struct Reader {
        const Score* scores;
        Value value;
        int64_t tie_index;

        // The flags of kWidth entries from `first`, a multiple of kWidth, on.
        template <int kWidth>
        __device__ Flags<kWidth> load(int64_t first) const {
            const auto pack = reinterpret_cast<const Pack<Score, kWidth>*>(scores)[first / kWidth];
            Flags<kWidth> flags;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const Value score = widen(pack.entries[j]);
                flags.kept[j] = score > value || (score == value && first + j < tie_index);
            }
            return flags;
        }
    };

    const Score* scores;
    const Value* value;
    const int64_t* tie_index;

    __device__ Reader open() const { return {scores, *value, *tie_index}; }

    bool takes_packs(int width) const {
        return reinterpret_cast<std::uintptr_t>(scores) % (sizeof(Score) * width) == 0;
    }
};

// A mask of bits, one per weight.
struct BitMask {
    using Entry = uint8_t;

    const uint8_t* bits;

    __device__ BitMask open() const { return *this; }

    // kWidth is at most 8: the flags of a pack lie in one byte.
    template <int kWidth>
    __device__ Flags<kWidth> load(int64_t first) const {
        const unsigned byte = bits[first / 8] >> (first % 8);
        Flags<kWidth> flags;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) flags.kept[j] = (byte >> j) & 1;
        return flags;
    }

    bool takes_packs(int) const { return true; }
};

// A mask of bits over blocks of `height` x `run` weights; the weight is [rows, width].
struct BlockMask {
    const uint8_t* bits;
    int rows, width, height, run;

    // The flags of kWidth weights of a row from `column` on.
    template <int kWidth>
    __device__ Flags<kWidth> load(int row, int column) const {
        const int64_t entries =
            static_cast<int64_t>(row / height) * (width / run);  // of the rows of blocks before
        int block = column / run;
        int left = run - (column - block * run);  // weights of this block
        bool kept = bit(entries + block);
        Flags<kWidth> flags;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            if (left == 0) {
                kept = bit(entries + ++block);
                left = run;
            }
            --left;
            flags.kept[j] = kept;
        }
        return flags;
    }

    __device__ bool bit(int64_t entry) const { return (bits[entry / 8] >> (entry % 8)) & 1; }
};

template <class To, class From>
__device__ To keep(From entry, bool kept) {
    const auto wide = widen(entry);
    return narrow<To>(kept ? wide : decltype(wide){0});
}

// out = kept ? weight : 0, by packs of kWidth entries; the entries after the last whole pack one by one.
template <class Weight, class Mask, class Out, int kWidth>
__global__ void __launch_bounds__(kThreads)
    masked_weight_kernel(const Weight* __restrict__ weight, Mask mask, int64_t size, Out* __restrict__ out) {
    const auto reader = mask.open();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;

    const int64_t packs = size / kWidth;
    for (int64_t pack = thread; pack < packs; pack += step) {
        const auto w = reinterpret_cast<const Pack<Weight, kWidth>*>(weight)[pack];
        const auto flags = reader.template load<kWidth>(pack * kWidth);
        Pack<Out, kWidth> result;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) result.entries[j] = keep<Out>(w.entries[j], flags.kept[j]);
        reinterpret_cast<Pack<Out, kWidth>*>(out)[pack] = result;
    }
    for (int64_t i = packs * kWidth + thread; i < size; i += step) {
        out[i] = keep<Out>(weight[i], reader.template load<1>(i).kept[0]);
    }
}

// The same with a bit per block: a thread block per row, whose length is whole packs.
template <class Weight, class Out, int kWidth>
__global__ void __launch_bounds__(kThreads)
    masked_blocks_kernel(const Weight* __restrict__ weight, BlockMask mask, Out* __restrict__ out) {
    for (int64_t row = blockIdx.x; row < mask.rows; row += gridDim.x) {
        const int64_t start = row * mask.width;
        for (int64_t pack = threadIdx.x; pack < mask.width / kWidth; pack += kThreads) {
            const auto w = reinterpret_cast<const Pack<Weight, kWidth>*>(weight + start)[pack];
            const auto flags = mask.load<kWidth>(static_cast<int>(row), static_cast<int>(pack * kWidth));
            Pack<Out, kWidth> result;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) result.entries[j] = keep<Out>(w.entries[j], flags.kept[j]);
            reinterpret_cast<Pack<Out, kWidth>*>(out + start)[pack] = result;
        }
    }
}

// d_weight = kept ? grad : 0 and, straight through the mask, d_scores = weight * grad: each input is read
// once.
template <class Grad, class Weight, class Mask, class Score, int kWidth>
__global__ void __launch_bounds__(kThreads)
    masked_grads_kernel(const Grad* __restrict__ grad, const Weight* __restrict__ weight, Mask mask,
                        int64_t size, Weight* __restrict__ d_weight, Score* __restrict__ d_scores) {
    const auto reader = mask.open();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;

    const int64_t packs = size / kWidth;
    for (int64_t pack = thread; pack < packs; pack += step) {
        const auto g = reinterpret_cast<const Pack<Grad, kWidth>*>(grad)[pack];
        const auto w = reinterpret_cast<const Pack<Weight, kWidth>*>(weight)[pack];
        const auto flags = reader.template load<kWidth>(pack * kWidth);
        Pack<Weight, kWidth> to_weight;
        Pack<Score, kWidth> to_scores;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            to_weight.entries[j] = keep<Weight>(g.entries[j], flags.kept[j]);
            to_scores.entries[j] = narrow<Score>(widen(w.entries[j]) * widen(g.entries[j]));
        }
        reinterpret_cast<Pack<Weight, kWidth>*>(d_weight)[pack] = to_weight;
        reinterpret_cast<Pack<Score, kWidth>*>(d_scores)[pack] = to_scores;
    }
    for (int64_t i = packs * kWidth + thread; i < size; i += step) {
        d_weight[i] = keep<Weight>(grad[i], reader.template load<1>(i).kept[0]);
        d_scores[i] = narrow<Score>(widen(weight[i]) * widen(grad[i]));
    }
}

// The bits of `size` scores, a byte per thread; those after the last score are 0.
template <class Score, int kWidth>
__global__ void __launch_bounds__(kThreads)
    pack_mask_kernel(ThresholdMask<Score> mask, int64_t size, uint8_t* __restrict__ bits) {
    const auto reader = mask.open();
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t bytes = (size + 7) / 8;
    for (int64_t byte = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; byte < bytes;
         byte += step) {
        const int64_t first = byte * 8;
        unsigned result = 0;
        if (first + 8 <= size) {
#pragma unroll
            for (int i = 0; i < 8; i += kWidth) {
                const auto flags = reader.template load<kWidth>(first + i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const unsigned bit = flags.kept[j];
                    result |= bit << (i + j);
                }
            }
        } else {
            for (int i = 0; first + i < size; ++i) {
                const unsigned bit = reader.template load<1>(first + i).kept[0];
                result |= bit << i;
            }
        }
        bits[byte] = static_cast<uint8_t>(result);
    }
}

// Calls launch(blocks) with as many blocks as `work` items need, at most those that keep the current device
// busy.
template <class Launch>
cudaError_t launch_over(int64_t work, const Launch& launch) {
    constexpr int kBlocksPerProcessor = 8;
    if (work == 0) return cudaSuccess;
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    launch(static_cast<unsigned>(std::min<int64_t>((work + kThreads - 1) / kThreads,
                                                   static_cast<int64_t>(processors) * kBlocksPerProcessor)));
    return cudaGetLastError();
}

template <int kWidth, class... Entries>
bool all_aligned(const Entries*... pointers) {
    return ((reinterpret_cast<std::uintptr_t>(pointers) % (sizeof(Entries) * kWidth) == 0) && ...);
}

// The functions below launch on `stream` of the current device. Loads and stores of the widest type are 16
// bytes where all arrays are aligned for that.

template <class Weight, class Mask, class Out>
cudaError_t masked_weight(const Weight* weight, const Mask& mask, int64_t size, Out* out,
                          cudaStream_t stream) {
    constexpr int kWidth = kPackWidth<Weight, typename Mask::Entry, Out>;
    const bool packed = all_aligned<kWidth>(weight, out) && mask.takes_packs(kWidth);
    const auto kernel = packed ? &masked_weight_kernel<Weight, Mask, Out, kWidth>
                               : &masked_weight_kernel<Weight, Mask, Out, 1>;
    return launch_over(packed ? (size + kWidth - 1) / kWidth : size, [&](unsigned blocks) {
        kernel<<<blocks, kThreads, 0, stream>>>(weight, mask, size, out);
    });
}

template <class Weight, class Out>
cudaError_t masked_blocks(const Weight* weight, const BlockMask& mask, Out* out, cudaStream_t stream) {
    constexpr int kWidth = kPackWidth<Weight, Out>;
    const bool packed = all_aligned<kWidth>(weight, out) && mask.width % kWidth == 0;
    const auto kernel =
        packed ? &masked_blocks_kernel<Weight, Out, kWidth> : &masked_blocks_kernel<Weight, Out, 1>;
    return launch_over(static_cast<int64_t>(mask.rows) * kThreads,
                       [&](unsigned blocks) { kernel<<<blocks, kThreads, 0, stream>>>(weight, mask, out); });
}

template <class Grad, class Weight, class Mask, class Score>
cudaError_t masked_grads(const Grad* grad, const Weight* weight, const Mask& mask, int64_t size,
                         Weight* d_weight, Score* d_scores, cudaStream_t stream) {
    constexpr int kWidth = kPackWidth<Grad, Weight, Score>;
    const bool packed = all_aligned<kWidth>(grad, weight, d_weight, d_scores) && mask.takes_packs(kWidth);
    const auto kernel = packed ? &masked_grads_kernel<Grad, Weight, Mask, Score, kWidth>
                               : &masked_grads_kernel<Grad, Weight, Mask, Score, 1>;
    return launch_over(packed ? (size + kWidth - 1) / kWidth : size, [&](unsigned blocks) {
        kernel<<<blocks, kThreads, 0, stream>>>(grad, weight, mask, size, d_weight, d_scores);
    });
}

template <class Score>
cudaError_t pack_mask(const ThresholdMask<Score>& mask, int64_t size, uint8_t* bits, cudaStream_t stream) {
    constexpr int kWidth = kPackWidth<Score>;
    const auto kernel =
        mask.takes_packs(kWidth) ? &pack_mask_kernel<Score, kWidth> : &pack_mask_kernel<Score, 1>;
    return launch_over((size + 7) / 8,
                       [&](unsigned blocks) { kernel<<<blocks, kThreads, 0, stream>>>(mask, size, bits); });
}

}  // namespace lpaf::cuda
