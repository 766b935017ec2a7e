// Element-wise halves of masked_linear on the CPU: the masked weight, and the gradients of weight and scores.
// No torch. Entry i is kept if score > value, or score == value and i < tie_index.
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

}  // namespace lpaf::cpu
