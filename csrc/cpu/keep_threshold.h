// Exact selection of the share of scores to keep. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/bracket_select.h"
#include "cpu/radix_select.h"
#include "cpu/score_key.h"

namespace lpaf::cpu {

// Keep floor(keep * n + 0.5) of the n entries of all spans together or, if they are weighted, the longest
// prefix in (score descending, index ascending) order whose weight is at most keep * total weight.
// `ParallelFor` is called as parallel_for(count, task) and runs task(i) for every i in [0, count).
// Throws InvalidEntryError for NaN scores, weights below 1 and weights whose sum overflows.
template <class Score, class ParallelFor>
auto keep_threshold(std::span<const ScoreSpan<Score>> spans, bool weighted, double keep, int threads,
                    const ParallelFor& parallel_for) {
    if (weighted) return RadixSelect<Score, true, ParallelFor>(spans, threads, parallel_for).run(keep);
    using Bracket = BracketSelect<Score, ParallelFor>;
    std::int64_t size = 0;
    for (const ScoreSpan<Score>& span : spans) size += span.size;
    const std::int64_t kept = keep_target(keep, size, false);
    if (size >= Bracket::kMinSize && kept > 0 && kept < size) {
        if (const auto threshold = Bracket(spans, std::max(threads, 1), parallel_for).run(kept))
            return *threshold;
    }
    return RadixSelect<Score, false, ParallelFor>(spans, threads, parallel_for).run(keep);
}

}  // namespace lpaf::cpu
