// y = (x u) v + scatter(x s, kept) + bias on the CPU in float32, and its gradients: the products, for some
// rows or columns. No torch.
//
// z = x [u|s] is a set of dot products of contiguous rows, because x and the packed `down` are contiguous
// along the input features. y = z v + bias is a sum of rows of `up`, contiguous along the outputs; the kept
// columns of S are added while that tile of y is in the first-level cache. Neither weight is stored a second
// time. The gradients are the same two kinds of product: d z = dy up^T is of dot products, d x = d z down
// and, with the first factor read transposed, d down = (d z)^T x and d up = z^T dy are sums of rows. Every
// entry is summed in an order that only the layer's sizes decide, not the rows, the tiles or the threads.
#pragma once

#include <cstdint>

namespace lpaf::cpu {

// Rows of a row-major matrix.
template <class Entry>
struct Rows {
    Entry* data;
    std::int64_t stride;

    Entry* operator[](std::int64_t row) const { return data + row * stride; }
};

// Sorted output positions of the kept columns; one of the pointers is set, or none where size is 0.
struct KeptColumns {
    const std::int32_t* as_int32 = nullptr;
    const std::int64_t* as_int64 = nullptr;
    std::int64_t size = 0;

    std::int64_t operator[](std::int64_t j) const { return as_int32 != nullptr ? as_int32[j] : as_int64[j]; }
};

struct LowRankSparseLayer {
    std::int64_t in, rank, out;
    const float* down;  // [rank + kept, in]
    const float* up;    // [rank, out]
    const float* bias;  // [out] or null
    KeptColumns kept;

    std::int64_t columns() const { return rank + kept.size; }  // of z
};

// The two products as compiled for one instruction set.
struct LowRankSparseKernels {
    // Features that one pass of `project` over `in` of them takes: more would not stay in the caches
    std::int64_t (*pass_depth)(std::int64_t in);
    // z[:, begin:end] = x down[begin:end]^T
    void (*project)(const LowRankSparseLayer& layer, Rows<const float> x, std::int64_t rows,
                    std::int64_t begin, std::int64_t end, Rows<float> z);
    // One pass of it for all columns, from feature `from` on, with which x begins; the first pass sets z, the
    // others add to it
    void (*project_pass)(const LowRankSparseLayer& layer, std::int64_t from, Rows<const float> x,
                         std::int64_t rows, Rows<float> z);
    // y[:, begin:end] = (z[:, :rank] up + scatter(z[:, rank:], kept) + bias)[:, begin:end], with room for
    // kSumDepth * kSumWidth floats to work in
    void (*expand)(const LowRankSparseLayer& layer, Rows<const float> z, std::int64_t rows,
                   std::int64_t begin, std::int64_t end, Rows<float> y, float* panel);
    // The same of z^T [rank, rows], for layers without kept columns.
    void (*expand_transposed)(const LowRankSparseLayer& layer, Rows<const float> z, std::int64_t rows,
                              std::int64_t begin, std::int64_t end, Rows<float> y, float* panel);
    // to[begin:end] = from[:, begin:end] summed over the rows
    void (*sum_columns)(Rows<const float> from, std::int64_t rows, std::int64_t begin, std::int64_t end,
                        float* to);
};

// Where columns are shared out among threads, shares of z and of y begin at multiples of these.
constexpr std::int64_t kDotColumns = 4;
constexpr std::int64_t kSumWidth = 128;
// Ranks per pass (130 and 260 are whole passes): a panel of `up` stays in the first-level cache, and long
// sums are sums of shorter ones.
constexpr std::int64_t kSumDepth = 130;

// Defined by lowrank_sparse_linear_kernels.cpp, which is compiled once per instruction set.
// Which of them this processor runs is chosen once.
const LowRankSparseKernels& lowrank_sparse_kernels();
extern const LowRankSparseKernels kBaselineKernels;
#if defined(__x86_64__)
extern const LowRankSparseKernels kAvx2Kernels;
extern const LowRankSparseKernels kAvx512Kernels;
#endif

}  // namespace lpaf::cpu
