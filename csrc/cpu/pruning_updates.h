// What pruning steps do to every weight, on the CPU: pieces of all matrices, and the loops over one piece.
// No torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cpu/masked_linear.h"

namespace lpaf::cpu {

struct MatrixShape {
    std::int64_t rows, columns;
};

// A unit of parallel work: consecutive rows of one matrix.
struct RowPiece {
    std::size_t matrix;
    std::int64_t first_row, rows;
};

// Entries per piece at least, where rows are shorter: below this, starting threads costs more than the work.
constexpr std::int64_t kPieceEntries = 1 << 15;

// Every row lies in one piece, so that its sum does not depend on how pieces are shared out.
inline std::vector<RowPiece> cut_into_pieces(std::span<const MatrixShape> shapes,
                                             std::int64_t least_rows = 1) {
    std::vector<RowPiece> pieces;
    for (std::size_t matrix = 0; matrix < shapes.size(); ++matrix) {
        const auto [rows, columns] = shapes[matrix];
        const std::int64_t step =
            std::max<std::int64_t>(least_rows, kPieceEntries / std::max<std::int64_t>(1, columns));
        for (std::int64_t row = 0; row < rows; row += step) {
            pieces.push_back({matrix, row, std::min(step, rows - row)});
        }
    }
    return pieces;
}

// Terms that are summed in the type of the terms; the sums of such blocks are added up in double.
constexpr std::int64_t kBlock = 512;
// Sums side by side inside a block: more than an instruction adds at once, and the same for every
// instruction set, so that all of them give the same sum.
constexpr std::int64_t kSums = 32;

template <class Real>
Real sum_block(const Real* terms, std::int64_t size) {
    Real sums[kSums] = {};
    const std::int64_t whole = size - size % kSums;
    for (std::int64_t i = 0; i < whole; i += kSums) {
        for (std::int64_t j = 0; j < kSums; ++j) sums[j] += terms[i + j];
    }
    for (std::int64_t i = whole; i < size; ++i) sums[i - whole] += terms[i];
    for (std::int64_t half = kSums / 2; half > 0; half /= 2) {
        for (std::int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
}

// The mean of the `size` terms that fill(begin, count, terms) writes block by block; 0 where there are none.
template <class Real, class Fill>
double mean(std::int64_t size, const Fill& fill) {
    Real terms[kBlock];
    double total = 0;
    for (std::int64_t begin = 0; begin < size; begin += kBlock) {
        const std::int64_t count = std::min(kBlock, size - begin);
        fill(begin, count, terms);
        total += static_cast<double>(sum_block(terms, count));
    }
    return total / static_cast<double>(std::max<std::int64_t>(1, size));
}

// scores -= rate weight grad
template <class Weight>
void accumulate_movement(const Weight* __restrict weights, const Weight* __restrict grads, Wide<Weight> rate,
                         std::int64_t size, Wide<Weight>* __restrict scores) {
    for (std::int64_t i = 0; i < size; ++i) scores[i] -= rate * (widen(weights[i]) * widen(grads[i]));
}

// terms = |weight grad|
template <class Weight>
void write_changes(const Weight* __restrict weights, const Weight* __restrict grads, std::int64_t size,
                   Wide<Weight>* __restrict terms) {
    for (std::int64_t i = 0; i < size; ++i) terms[i] = std::abs(widen(weights[i]) * widen(grads[i]));
}

// importance = beta importance + (1 - beta) mean of |weight grad|, row by row
template <class Weight>
void update_importance(const Weight* weights, const Weight* grads, double beta, std::int64_t rows,
                       std::int64_t columns, Wide<Weight>* importance) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const Weight *w = weights + row * columns, *g = grads + row * columns;
        const double change =
            mean<Wide<Weight>>(columns, [w, g](std::int64_t begin, std::int64_t count, Wide<Weight>* terms) {
                write_changes(w + begin, g + begin, count, terms);
            });
        importance[row] =
            static_cast<Wide<Weight>>(beta * static_cast<double>(importance[row]) + (1 - beta) * change);
    }
}

// What two averages keep of their past, and what they take of the present.
template <class Real>
struct Rates {
    Rates(double first, double second)
        : keep1(static_cast<Real>(first)),
          take1(static_cast<Real>(1 - first)),
          keep2(static_cast<Real>(second)),
          take2(static_cast<Real>(1 - second)) {}
    Real keep1, take1, keep2, take2;
};

// The averages of the change |weight grad| and then of its distance to the new average; terms = their
// product.
template <class Weight>
void update_averages(const Weight* __restrict weights, const Weight* __restrict grads,
                     Rates<Wide<Weight>> rates, std::int64_t size, Wide<Weight>* __restrict sensitivity,
                     Wide<Weight>* __restrict uncertainty, Wide<Weight>* __restrict terms) {
    for (std::int64_t i = 0; i < size; ++i) {
        const Wide<Weight> change = std::abs(widen(weights[i]) * widen(grads[i]));
        const Wide<Weight> average = rates.keep1 * sensitivity[i] + rates.take1 * change;
        const Wide<Weight> distance = rates.keep2 * uncertainty[i] + rates.take2 * std::abs(change - average);
        sensitivity[i] = average;
        uncertainty[i] = distance;
        terms[i] = average * distance;
    }
}

// The same row by row; scores = the means of the products.
template <class Weight>
void update_sensitivity(const Weight* weights, const Weight* grads, Rates<Wide<Weight>> rates,
                        std::int64_t rows, std::int64_t columns, Wide<Weight>* sensitivity,
                        Wide<Weight>* uncertainty, Wide<Weight>* scores) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t start = row * columns;
        scores[row] = static_cast<Wide<Weight>>(
            mean<Wide<Weight>>(columns, [=](std::int64_t begin, std::int64_t count, Wide<Weight>* terms) {
                update_averages(weights + start + begin, grads + start + begin, rates, count,
                                sensitivity + start + begin, uncertainty + start + begin, terms);
            }));
    }
}

// The next two look at the bits of 16-bit types: that is exact, and compilers vectorise it.
template <class Weight>
bool is_nonzero(Weight weight) {
    if constexpr (sizeof(Weight) == 2) {
        return (weight.bits & 0x7FFF) != 0;
    } else {
        return weight != 0;
    }
}

template <class Weight>
Weight kept_or_zero(bool kept, Weight weight) {
    if constexpr (sizeof(Weight) == 2) {
        return {static_cast<std::uint16_t>(kept ? weight.bits : 0)};
    } else {
        return kept ? weight : Weight{0};
    }
}

// Rows whose score is not kept become 0. A matrix with a score per entry has rows of one column.
template <class Weight>
void zero_pruned(const Wide<Weight>* __restrict scores, Wide<Weight> value, std::int64_t tie_index,
                 std::int64_t rows, std::int64_t columns, Weight* __restrict weights) {
    split_at_tie(rows, value, tie_index, [=](std::int64_t begin, std::int64_t end, auto is_kept) {
        if (columns == 1) {
            for (std::int64_t i = begin; i < end; ++i)
                weights[i] = kept_or_zero(is_kept(scores[i]), weights[i]);
            return;
        }
        for (std::int64_t row = begin; row < end; ++row) {
            if (is_kept(scores[row])) continue;
            std::fill_n(weights + row * columns, columns, Weight{});
        }
    });
}

struct Counts {
    std::int64_t nonzero = 0, rows = 0;
};

// Nonzero entries, and rows that hold one; `column_used` becomes 1 where a column does.
template <class Weight>
Counts count_nonzero(const Weight* weights, std::int64_t rows, std::int64_t columns,
                     std::uint8_t* __restrict column_used) {
    Counts counts;
    std::uint8_t nonzero[kBlock];
    for (std::int64_t row = 0; row < rows; ++row) {
        std::int64_t in_row = 0;
        for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
            const std::int64_t count = std::min(kBlock, columns - begin);
            const Weight* entries = weights + row * columns + begin;
            for (std::int64_t i = 0; i < count; ++i) nonzero[i] = is_nonzero(entries[i]);
            std::int32_t in_block = 0;
            for (std::int64_t i = 0; i < count; ++i) {
                in_block += nonzero[i];
                column_used[begin + i] |= nonzero[i];
            }
            in_row += in_block;
        }
        counts.nonzero += in_row;
        counts.rows += in_row != 0;
    }
    return counts;
}

}  // namespace lpaf::cpu
