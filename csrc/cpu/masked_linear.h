// Element-wise halves of masked_linear on the CPU: the masked weight, and the gradients of weight and scores.
// No torch. Entry i is kept if score > value, or score == value and i < tie_index; a mask of bits holds that
// for entry i in bit i % 8, the lowest first, of byte i / 8, and an entry may stand for a block of weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/scalar_types.h"

namespace lpaf::cpu {

// The type that masked operations compute in: double for double, else float.
template <class Scalar>
using Wide = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <class Scalar>
Wide<Scalar> widen(Scalar value) {
    if constexpr (std::is_same_v<Scalar, double>) {
        return value;
    } else {
        return to_float(value);
    }
}

template <class To, class From>
To narrow(From value) {
    if constexpr (std::is_same_v<To, double>) {
        return static_cast<double>(value);
    } else {
        return from_float<To>(static_cast<float>(value));
    }
}

// Calls kept_loop(begin, end, is_kept) for the entries before tie_index, where equality keeps, and for those
// from it on, where it does not: inside each loop the mask is one comparison.
template <class Value, class Loop>
void split_at_tie(std::int64_t size, Value value, std::int64_t tie_index, const Loop& loop) {
    const std::int64_t split = std::clamp<std::int64_t>(tie_index, 0, size);
    loop(std::int64_t{0}, split, [value](Value score) { return score >= value; });
    loop(split, size, [value](Value score) { return score > value; });
}

// out = kept ? weight : 0
template <class Weight, class Score, class Out>
void masked_weight(const Weight* __restrict weight, const Score* __restrict scores, Wide<Score> value,
                   std::int64_t tie_index, std::int64_t size, Out* __restrict out) {
    split_at_tie(size, value, tie_index, [=](std::int64_t begin, std::int64_t end, auto is_kept) {
        for (std::int64_t i = begin; i < end; ++i) {
            const Wide<Weight> entry = widen(weight[i]);
            out[i] = narrow<Out>(is_kept(widen(scores[i])) ? entry : Wide<Weight>{0});
        }
    });
}

// d_weight = kept ? grad : 0 and, straight through the mask, d_scores = weight * grad
template <class Grad, class Weight, class Score>
void masked_grads(const Grad* __restrict grad, const Weight* __restrict weight,
                  const Score* __restrict scores, Wide<Score> value, std::int64_t tie_index,
                  std::int64_t size, Weight* __restrict d_weight, Score* __restrict d_scores) {
    split_at_tie(size, value, tie_index, [=](std::int64_t begin, std::int64_t end, auto is_kept) {
        for (std::int64_t i = begin; i < end; ++i) {
            const Wide<Grad> slope = widen(grad[i]);
            d_weight[i] = narrow<Weight>(is_kept(widen(scores[i])) ? slope : Wide<Grad>{0});
            d_scores[i] = narrow<Score>(widen(weight[i]) * slope);
        }
    });
}

// The bits of `size` scores; those after the last score are 0.
template <class Score>
void pack_mask(const Score* __restrict scores, Wide<Score> value, std::int64_t tie_index, std::int64_t size,
               std::uint8_t* __restrict bits) {
    std::fill_n(bits, (size + 7) / 8, std::uint8_t{0});
    split_at_tie(size, value, tie_index, [=](std::int64_t begin, std::int64_t end, auto is_kept) {
        for (std::int64_t i = begin; i < end; ++i) {
            bits[i / 8] |= static_cast<std::uint8_t>(is_kept(widen(scores[i])) ? 1u << (i % 8) : 0u);
        }
    });
}

// A byte, 0 or 1, for each of `size` entries from `first` on.
inline void unpack_mask(const std::uint8_t* __restrict bits, std::int64_t first, std::int64_t size,
                        std::uint8_t* __restrict kept) {
    std::int64_t i = 0;
    if (first % 8 == 0) {
        for (; i + 8 <= size; i += 8) {
            const unsigned byte = bits[(first + i) / 8];
            for (int j = 0; j < 8; ++j) kept[i + j] = (byte & (1u << j)) != 0;
        }
    }
    for (; i < size; ++i) kept[i] = (bits[(first + i) / 8] >> ((first + i) % 8)) & 1;
}

// out = kept ? weight : 0 on a part of a row, `run` weights for each of `size` entries of kept.
template <class Weight, class Out>
void masked_runs(const Weight* __restrict weight, const std::uint8_t* __restrict kept, std::int64_t size,
                 std::int64_t run, Out* __restrict out) {
    if (run == 1) {
        for (std::int64_t i = 0; i < size; ++i) {
            out[i] = narrow<Out>(kept[i] != 0 ? widen(weight[i]) : Wide<Weight>{0});
        }
        return;
    }
    for (std::int64_t i = 0; i < size; ++i) {
        if (kept[i] == 0) {
            std::fill_n(out + i * run, run, Out{});
            continue;
        }
        for (std::int64_t j = i * run; j < (i + 1) * run; ++j) out[j] = narrow<Out>(widen(weight[j]));
    }
}

// The sum of weight * grad over `size` entries, in a fixed order that fills vectors.
template <class Sum, class Grad, class Weight>
Sum dot(const Grad* __restrict grad, const Weight* __restrict weight, std::int64_t size) {
    constexpr std::int64_t kLanes = 16;
    Sum lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] += widen(weight[i + j]) * widen(grad[i + j]);
    }
    for (std::int64_t j = 0; i + j < size; ++j) lanes[j] += widen(weight[i + j]) * widen(grad[i + j]);
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    return lanes[0];
}

// d_weight = kept ? grad : 0 on a part of a row, and for each entry of kept the sum of weight * grad over its
// run is added to `sums`.
template <class Grad, class Weight>
void masked_grad_runs(const Grad* __restrict grad, const Weight* __restrict weight,
                      const std::uint8_t* __restrict kept, std::int64_t size, std::int64_t run,
                      Weight* __restrict d_weight, Wide<Weight>* __restrict sums) {
    masked_runs(grad, kept, size, run, d_weight);
    if (run == 1) {
        for (std::int64_t i = 0; i < size; ++i) sums[i] += widen(weight[i]) * widen(grad[i]);
        return;
    }
    for (std::int64_t i = 0; i < size; ++i) {
        sums[i] += dot<Wide<Weight>>(grad + i * run, weight + i * run, run);
    }
}

}  // namespace lpaf::cpu
