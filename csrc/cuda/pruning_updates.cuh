// What pruning steps do to every weight, on the GPU: one launch for all matrices. No torch.
//
// Work on entries is cut into tiles of kTileEntries, work on rows into tiles of kWarps rows, a warp to a row.
// The sums of a warp's lanes are added up in one order, so that a row's sum is the same in every run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <type_traits>

#include <cuda_runtime.h>

#include "cuda/scalar_types.cuh"
#include "cuda/tensor_table.h"

namespace lpaf::cuda::pruning {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kTileEntries = 16 * kThreads;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// What scores, averages and sums over matrices of Weight are kept in.
template <class Weight>
using State = typename ThresholdOf<Weight>::type;

// How many entries of type T 16 bytes hold.
template <class T>
constexpr int kPackWidth = static_cast<int>(16 / sizeof(T));

// Whether all pointers may be read in packs of `width` entries.
template <class... T>
bool are_aligned(int width, const T*... pointers) {
    return ((reinterpret_cast<std::uintptr_t>(pointers) % (sizeof(T) * width) == 0) && ...);
}

template <int kWidth, class T>
__device__ Pack<T, kWidth> load(const T* from) {
    return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

template <int kWidth, class T>
__device__ void store(T* to, const Pack<T, kWidth>& pack) {
    *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// A thread block runs its tile of one entry of the table, in packs of Entry::kWidth where they can be read.
template <class Entry, class... Scalars>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ TensorTable<Entry> table, Scalars... scalars) {
    const Entry& entry = table.entries[table.find(blockIdx.x)];
    const std::int64_t tile = blockIdx.x - entry.first_tile;
    if (entry.packed) {
        entry.template run<Entry::kWidth>(tile, scalars...);
    } else {
        entry.template run<1>(tile, scalars...);
    }
}

// Runs all entries on `stream` of the current device: one launch per table that they fill.
template <class Entry, class... Scalars>
cudaError_t launch(std::span<const Entry> entries, cudaStream_t stream, Scalars... scalars) {
    return for_each_table<cudaError_t>(entries, [&](const TensorTable<Entry>& table) {
        update_kernel<Entry, Scalars...><<<table.tiles, kThreads, 0, stream>>>(table, scalars...);
        return cudaGetLastError();
    });
}

// Calls task(i, width) for packs that begin at entry i and cover `count` entries, from thread to thread;
// `width` is a constant, kWidth or, after the last whole pack, 1.
template <int kWidth, class Task>
__device__ void for_each_pack(int count, const Task& task) {
    const int packs = count / kWidth, thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < packs; i += kThreads) task(i * kWidth, std::integral_constant<int, kWidth>{});
    for (int i = packs * kWidth + thread; i < count; i += kThreads) {
        task(i, std::integral_constant<int, 1>{});
    }
}

// How many of `size` entries or rows lie in the tile of `tile_size` that begins at `begin`.
__device__ inline int count_in_tile(std::int64_t begin, std::int64_t size, int tile_size) {
    return static_cast<int>(min(static_cast<std::int64_t>(tile_size), size - begin));
}

// The mean over a row of `columns` entries whose packs of kWidth entries sum to pack_sum(first entry); 0
// where there are none. For a whole warp; every lane has the result.
template <int kWidth, class PackSum>
__device__ double row_mean(std::int64_t columns, const PackSum& pack_sum) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    double total = 0;
    for (std::int64_t i = lane * kWidth; i < columns; i += kLanes * kWidth) {
        total += static_cast<double>(pack_sum(i));
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, offset);
    }
    return total / static_cast<double>(columns > 0 ? columns : 1);
}

// The row of this thread's warp in a tile of rows.
__device__ inline std::int64_t row_of_warp(std::int64_t tile) {
    return tile * kWarps + threadIdx.x / kLanes;
}

// scores -= rate weight grad
template <class Weight>
struct MovementEntry {
    static constexpr int kWidth = kPackWidth<State<Weight>>;
    const Weight* weights;
    const Weight* grads;
    State<Weight>* scores;
    std::int64_t size;
    std::uint32_t first_tile = 0;
    bool packed = false;

    std::int64_t tiles() const { return ceil_div(size, kTileEntries); }
    bool can_pack() const { return are_aligned(kWidth, weights, grads, scores); }

    template <int kPack>
    __device__ void run(std::int64_t tile, State<Weight> rate) const {
        const std::int64_t begin = tile * kTileEntries;
        const Weight *w = weights + begin, *g = grads + begin;
        State<Weight>* s = scores + begin;
        for_each_pack<kPack>(count_in_tile(begin, size, kTileEntries), [=](int i, auto width) {
            const auto weight = load<width.value>(w + i), grad = load<width.value>(g + i);
            auto score = load<width.value>(s + i);
#pragma unroll
            for (int j = 0; j < width.value; ++j) {
                score.entries[j] -= rate * (widen(weight.entries[j]) * widen(grad.entries[j]));
            }
            store<width.value>(s + i, score);
        });
    }
};

// importance = beta importance + (1 - beta) mean of |weight grad|, row by row
template <class Weight>
struct ImportanceEntry {
    static constexpr int kWidth = kPackWidth<Weight>;
    const Weight* weights;
    const Weight* grads;
    State<Weight>* importance;
    std::int64_t rows, columns;
    std::uint32_t first_tile = 0;
    bool packed = false;

    std::int64_t tiles() const { return ceil_div(rows, kWarps); }
    bool can_pack() const { return columns % kWidth == 0 && are_aligned(kWidth, weights, grads); }

    template <int kPack>
    __device__ void run(std::int64_t tile, double beta) const {
        const std::int64_t row = row_of_warp(tile);
        if (row >= rows) return;
        const Weight *row_weights = weights + row * columns, *row_grads = grads + row * columns;
        const double change = row_mean<kPack>(columns, [&](std::int64_t i) {
            const auto w = load<kPack>(row_weights + i), g = load<kPack>(row_grads + i);
            State<Weight> sum = 0;
#pragma unroll
            for (int j = 0; j < kPack; ++j) sum += fabs(widen(w.entries[j]) * widen(g.entries[j]));
            return sum;
        });
        if (threadIdx.x % kLanes != 0) return;
        importance[row] = static_cast<State<Weight>>(beta * importance[row] + (1 - beta) * change);
    }
};

// What two averages keep of their past, and what they take of the present.
template <class Real>
struct Rates {
    Real keep1, take1, keep2, take2;
};

// The averages of the change |weight grad| and then of its distance to the new average, entry by entry;
// scores = the means over rows of their products.
template <class Weight>
struct SensitivityEntry {
    static constexpr int kWidth = kPackWidth<State<Weight>>;
    const Weight* weights;
    const Weight* grads;
    State<Weight>* sensitivity;
    State<Weight>* uncertainty;
    State<Weight>* scores;
    std::int64_t rows, columns;
    std::uint32_t first_tile = 0;
    bool packed = false;

    std::int64_t tiles() const { return ceil_div(rows, kWarps); }
    bool can_pack() const {
        return columns % kWidth == 0 && are_aligned(kWidth, weights, grads, sensitivity, uncertainty);
    }

    template <int kPack>
    __device__ void run(std::int64_t tile, Rates<State<Weight>> rates) const {
        const std::int64_t row = row_of_warp(tile);
        if (row >= rows) return;
        const double score = row_mean<kPack>(columns, [&](std::int64_t column) {
            const std::int64_t i = row * columns + column;
            const auto w = load<kPack>(weights + i), g = load<kPack>(grads + i);
            auto averages = load<kPack>(sensitivity + i), distances = load<kPack>(uncertainty + i);
            State<Weight> sum = 0;
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
                State<Weight>&average = averages.entries[j], &distance = distances.entries[j];
                const State<Weight> change = fabs(widen(w.entries[j]) * widen(g.entries[j]));
                average = rates.keep1 * average + rates.take1 * change;
                distance = rates.keep2 * distance + rates.take2 * fabs(change - average);
                sum += average * distance;
            }
            store<kPack>(sensitivity + i, averages);
            store<kPack>(uncertainty + i, distances);
            return sum;
        });
        if (threadIdx.x % kLanes == 0) scores[row] = static_cast<State<Weight>>(score);
    }
};

// Rows whose score is not kept become 0. A matrix with a score per entry has rows of one column. `value` and
// `tie_index` are device pointers, so nothing waits for the GPU.
template <class Weight>
struct ZeroEntry {
    static constexpr int kWidth = kPackWidth<State<Weight>>;
    Weight* weights;
    const State<Weight>* scores;
    const State<Weight>* value;
    const std::int64_t* tie_index;
    std::int64_t rows, columns;
    std::uint32_t first_tile = 0;
    bool packed = false;

    std::int64_t tiles() const { return ceil_div(rows, columns == 1 ? kTileEntries : kWarps); }
    bool can_pack() const {
        return columns == 1 ? are_aligned(kWidth, weights, scores)
                            : columns % kWidth == 0 && are_aligned(kWidth, weights);
    }

    template <int kPack>
    __device__ void run(std::int64_t tile) const {
        const int tile_size = columns == 1 ? kTileEntries : kWarps;
        const std::int64_t begin = tile * tile_size;
        const int count = count_in_tile(begin, rows, tile_size);
        const State<Weight>* tile_scores = scores + begin;
        Weight* tile_weights = weights + begin * columns;
        const State<Weight> lowest = *value;
        // Before `ties` a score that equals `lowest` is kept.
        const int ties = static_cast<int>(
            max(static_cast<std::int64_t>(0), min(static_cast<std::int64_t>(count), *tie_index - begin)));
        const auto is_kept = [=](State<Weight> score, int i) {
            return score > lowest || (score == lowest && i < ties);
        };
        const Weight zero = narrow<Weight>(State<Weight>{0});
        if (columns == 1) {
            for_each_pack<kPack>(count, [=](int i, auto width) {
                const auto score = load<width.value>(tile_scores + i);
                auto weight = load<width.value>(tile_weights + i);
#pragma unroll
                for (int j = 0; j < width.value; ++j) {
                    if (!is_kept(score.entries[j], i + j)) weight.entries[j] = zero;
                }
                store<width.value>(tile_weights + i, weight);
            });
            return;
        }
        const int row = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
        if (row >= count || is_kept(tile_scores[row], row)) return;
        Pack<Weight, kPack> zeros;
#pragma unroll
        for (int j = 0; j < kPack; ++j) zeros.entries[j] = zero;
        for (std::int64_t i = lane * kPack; i < columns; i += kLanes * kPack) {
            store<kPack>(tile_weights + row * columns + i, zeros);
        }
    }
};

// Counts nonzero entries, rows and columns into counts[0..2], which begin as 0, as do the bitmaps of the rows
// and columns that hold one: who sets a bit counts it. A warp takes kLanes rows by kLanes packs of columns.
template <class Weight>
struct StatisticsEntry {
    static constexpr int kWidth = kPackWidth<Weight>;
    const Weight* weights;
    unsigned long long* counts;
    std::uint32_t* row_bits;
    std::uint32_t* column_bits;
    std::int64_t rows, columns;
    std::uint32_t first_tile = 0;
    bool packed = false;

    std::int64_t warp_tiles(int width) const {
        return ceil_div(rows, kLanes) * ceil_div(columns, kLanes * width);
    }
    std::int64_t tiles() const { return ceil_div(warp_tiles(can_pack() ? kWidth : 1), kWarps); }
    bool can_pack() const { return columns % kWidth == 0 && are_aligned(kWidth, weights); }

    // Adds to `count` the bits of `found` that nobody had set in `word`.
    static __device__ void count_new(std::uint32_t* word, std::uint32_t found, unsigned long long* count) {
        if (found == 0) return;
        const int added = __popc(found & ~atomicOr(word, found));
        if (added != 0) atomicAdd(count, static_cast<unsigned long long>(added));
    }

    template <int kPack>
    __device__ void run(std::int64_t tile) const {
        const int lane = static_cast<int>(threadIdx.x) % kLanes;
        const std::int64_t warp_tile = row_of_warp(tile), across = ceil_div(columns, kLanes * kPack);
        const std::int64_t row_tile = warp_tile / across, column_tile = warp_tile % across;
        const std::int64_t first_row = row_tile * kLanes, column = (column_tile * kLanes + lane) * kPack;
        if (first_row >= rows) return;
        const int rows_here = count_in_tile(first_row, rows, kLanes);

        std::uint32_t rows_found = 0, columns_found = 0, nonzero = 0;
        for (int row = 0; row < rows_here; ++row) {
            std::uint32_t found = 0;  // a bit per column of this lane's pack
            if (column < columns) {
                const auto w = load<kPack>(weights + (first_row + row) * columns + column);
#pragma unroll
                for (int j = 0; j < kPack; ++j) {
                    found |= static_cast<std::uint32_t>(widen(w.entries[j]) != 0) << j;
                }
            }
            nonzero += __popc(found);
            columns_found |= found;
            rows_found |= static_cast<std::uint32_t>(__any_sync(kAllLanes, found != 0)) << row;
        }

        nonzero = __reduce_add_sync(kAllLanes, nonzero);
        if (lane == 0) {
            atomicAdd(counts, static_cast<unsigned long long>(nonzero));
            count_new(row_bits + row_tile, rows_found, counts + 1);
        }
        // The lanes whose columns share a word of the bitmap: one of them sets it for all.
        constexpr int kSharing = 32 / kPack;
        const int first_lane = lane / kSharing * kSharing;
        const unsigned sharing = (kAllLanes >> (kLanes - kSharing)) << first_lane;
        const std::uint32_t word = __reduce_or_sync(sharing, columns_found << ((lane - first_lane) * kPack));
        if (lane == first_lane) count_new(column_bits + column / 32, word, counts + 2);
    }
};

}  // namespace lpaf::cuda::pruning
