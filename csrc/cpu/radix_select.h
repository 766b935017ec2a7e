// Exact selection of the share of scores to keep: a most-significant-digit radix select. No torch.
//
// Scores are mapped to unsigned keys of the same order. A histogram of the keys' leading digit tells in which
// bin the last kept entry lies; the next digit is counted among the entries of that bin only, and so on until
// the key is known. Each round reads the scores once.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/score_key.h"

namespace lpaf::cpu {

// out[i] = the `bits` bits of the key of scores[i] above its `low` lowest ones, or `other` where the bits
// above those are not `prefix`. Returns whether all of out is equal.
template <class Score>
LPAF_MULTIVERSION bool extract_digits(const Score* __restrict scores, std::size_t size, int low, int bits,
                                      typename ScoreKey<Score>::Key prefix, std::uint32_t other,
                                      std::uint32_t* __restrict out) {
    using Key = typename ScoreKey<Score>::Key;
    const Key mask = (Key{1} << bits) - 1;
    std::uint32_t all = ~0u, any = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const Key leading = ScoreKey<Score>::key(scores[i]) >> low;
        const std::uint32_t digit =
            (leading >> bits) == prefix ? static_cast<std::uint32_t>(leading & mask) : other;
        out[i] = digit;
        all &= digit;
        any |= digit;
    }
    return all == any;
}

// Selects from one list of spans. `ParallelFor` is called as parallel_for(count, task) and runs task(i) for
// every i in [0, count), on as many threads as it likes.
template <class Score, bool Weighted, class ParallelFor>
class RadixSelect {
  public:
    using Traits = ScoreKey<Score>;
    using Key = typename Traits::Key;
    using Threshold = KeepThreshold<typename Traits::Value>;

    RadixSelect(std::span<const ScoreSpan<Score>> spans, int threads, const ParallelFor& parallel_for)
        : pieces_(cut(spans, std::max(threads, 1))), parallel_for_(parallel_for) {
        if (!pieces_.empty()) size_ = pieces_.back().first + pieces_.back().size;
        bins_.resize(pieces_.size() * kBins);
    }

    Threshold run(double keep) {
        using Value = typename Traits::Value;
        if constexpr (Weighted) check_weights();
        count_digits(0, 0);
        check_nan();
        const std::int64_t total = std::accumulate(merged_.begin(), merged_.end(), std::int64_t{0});
        std::int64_t remaining = keep_target(keep, total, Weighted);
        if (remaining <= 0) return {std::numeric_limits<Value>::infinity(), 0};
        if (remaining >= total) return {-std::numeric_limits<Value>::infinity(), size_};

        Key prefix = 0;
        std::size_t digit = 0;
        for (int level = 0;; ++level) {
            digit = choose_digit(remaining);
            prefix = static_cast<Key>(prefix << width(level)) | static_cast<Key>(digit);
            if (level + 1 == kLevels) break;
            count_digits(level + 1, prefix);
        }
        if constexpr (Weighted) {
            return last_within_budget(prefix, digit, remaining);
        } else {
            return {value_of(prefix), nth_tie(prefix, digit, remaining) + 1};
        }
    }

  private:
    static constexpr int kDigitBits = 11;
    static constexpr std::size_t kBins = std::size_t{1} << kDigitBits;
    static constexpr int kLevels = (Traits::kUsedBits + kDigitBits - 1) / kDigitBits;
    static constexpr std::size_t kBlock = 512;
    // Equal neighbours would make each increment wait for the one before it: four copies take turns.
    static constexpr std::size_t kCopies = 4;

    using Counter = std::conditional_t<Weighted, std::int64_t, std::uint32_t>;

    static constexpr int width(int level) {
        return std::min(kDigitBits, Traits::kKeyBits - level * kDigitBits);
    }
    static constexpr int shift(int level) { return Traits::kKeyBits - level * kDigitBits - width(level); }
    static constexpr int kLastShift = shift(kLevels - 1);

    static typename Traits::Value value_of(Key prefix) {
        return Traits::value(static_cast<Key>(prefix << kLastShift));
    }

    template <class Task>
    void for_each_piece(const Task& task) {
        parallel_for_(static_cast<std::int64_t>(pieces_.size()), task);
    }

    Counter* bins_of(std::int64_t piece) { return bins_.data() + static_cast<std::size_t>(piece) * kBins; }

    void check_weights() {
        double total = 0;
        for (const Piece<Score>& piece : pieces_) {
            std::int64_t smallest = 1;
            double sum = 0;
            for (std::int64_t i = 0; i < piece.size; ++i) {
                smallest = std::min(smallest, piece.weights[i]);
                sum += static_cast<double>(piece.weights[i]);
            }
            total += sum;
            if (smallest < 1) throw InvalidEntryError(piece.span, "a count that is not positive");
            if (total > 0x1p62) throw InvalidEntryError(piece.span, "counts that overflow");
        }
    }

    static void count_piece(const Piece<Score>& piece, int level, Key prefix, Counter* bins) {
        alignas(64) Counter copies[kCopies][kBins + 1] = {};
        std::uint32_t digit[kBlock];
        const auto size = static_cast<std::size_t>(piece.size);
        for (std::size_t begin = 0; begin < size; begin += kBlock) {
            const std::size_t block = std::min(kBlock, size - begin);
            const bool all_equal = extract_digits(piece.scores + begin, block, shift(level), width(level),
                                                  prefix, static_cast<std::uint32_t>(kBins), digit);
            if constexpr (Weighted) {
                for (std::size_t i = 0; i < block; ++i) {
                    copies[i % kCopies][digit[i]] += piece.weights[begin + i];
                }
            } else if (all_equal) {
                copies[0][digit[0]] += static_cast<Counter>(block);
            } else {
                std::size_t i = 0;
                for (; i + kCopies <= block; i += kCopies) {
                    for (std::size_t copy = 0; copy < kCopies; ++copy) ++copies[copy][digit[i + copy]];
                }
                for (; i < block; ++i) ++copies[0][digit[i]];
            }
        }
        for (std::size_t bin = 0; bin < kBins; ++bin) {
            Counter sum = 0;
            for (std::size_t copy = 0; copy < kCopies; ++copy) sum += copies[copy][bin];
            bins[bin] = sum;
        }
    }

    // Count digit `level` of the entries whose leading digits are `prefix`.
    void count_digits(int level, Key prefix) {
        for_each_piece([&](std::int64_t i) {
            count_piece(pieces_[static_cast<std::size_t>(i)], level, prefix, bins_of(i));
        });
        merged_.fill(0);
        for (std::size_t piece = 0; piece < pieces_.size(); ++piece) {
            const Counter* bins = bins_of(static_cast<std::int64_t>(piece));
            for (std::size_t bin = 0; bin < kBins; ++bin) merged_[bin] += bins[bin];
        }
    }

    // Keys of NaN lie beyond those of the infinities, so only the outermost bins can hold one.
    void check_nan() {
        constexpr auto highest = static_cast<std::size_t>(Traits::kInfinity >> shift(0));
        constexpr auto lowest = static_cast<std::size_t>(Traits::kMinusInfinity >> shift(0));
        const auto counted = [](std::int64_t count) { return count != 0; };
        if (std::none_of(merged_.begin() + highest, merged_.end(), counted) &&
            std::none_of(merged_.begin(), merged_.begin() + lowest + 1, counted)) {
            return;
        }
        std::vector<std::uint8_t> found(pieces_.size(), 0);
        for_each_piece([&](std::int64_t i) {
            const Piece<Score>& piece = pieces_[static_cast<std::size_t>(i)];
            bool any = false;
            for (std::int64_t j = 0; j < piece.size; ++j) any |= Traits::is_nan(piece.scores[j]);
            found[static_cast<std::size_t>(i)] = any;
        });
        refuse_nan<Score>(pieces_, found);
    }

    // The bin that holds the last kept entry (Weighted: the first entry that does not fit); `remaining` loses
    // what the bins above it take.
    std::size_t choose_digit(std::int64_t& remaining) const {
        std::size_t bin = kBins - 1;
        while (Weighted ? merged_[bin] <= remaining : merged_[bin] < remaining) remaining -= merged_[bin--];
        return bin;
    }

    static bool is_tie(const Piece<Score>& piece, std::int64_t i, Key prefix) {
        return (Traits::key(piece.scores[i]) >> kLastShift) == prefix;
    }

    // Index of the n-th entry (from 1) whose key is `prefix`.
    std::int64_t nth_tie(Key prefix, std::size_t digit, std::int64_t n) {
        std::size_t position = 0;
        while (std::int64_t{bins_of(static_cast<std::int64_t>(position))[digit]} < n) {
            n -= bins_of(static_cast<std::int64_t>(position++))[digit];
        }
        const Piece<Score>& piece = pieces_[position];
        for (std::int64_t begin = 0;; begin += kBlock) {
            const std::int64_t end = std::min<std::int64_t>(begin + kBlock, piece.size);
            std::int64_t ties = 0;
            for (std::int64_t i = begin; i < end; ++i) ties += is_tie(piece, i, prefix);
            if (ties < n) {
                n -= ties;
                continue;
            }
            std::int64_t i = begin;
            while (!is_tie(piece, i, prefix) || --n > 0) ++i;
            return piece.first + i;
        }
    }

    // The entries of key `prefix` are kept in index order while their weights fit into `remaining`.
    Threshold last_within_budget(Key prefix, std::size_t digit, std::int64_t remaining) {
        std::int64_t last = -1;
        bool fits = true;
        for (std::size_t position = 0; position < pieces_.size() && fits; ++position) {
            if (bins_of(static_cast<std::int64_t>(position))[digit] == 0) continue;
            const Piece<Score>& piece = pieces_[position];
            for (std::int64_t i = 0; i < piece.size && fits; ++i) {
                if (!is_tie(piece, i, prefix)) continue;
                fits = piece.weights[i] <= remaining;
                if (!fits) break;
                remaining -= piece.weights[i];
                last = piece.first + i;
            }
        }
        return last < 0 ? last_above(prefix) : Threshold{value_of(prefix), last + 1};
    }

    // No entry of key `prefix` fits: the last kept entry is the last one with the next higher key, if any.
    Threshold last_above(Key prefix) const {
        Key next = std::numeric_limits<Key>::max();
        std::int64_t last = -1;
        for (const Piece<Score>& piece : pieces_) {
            for (std::int64_t i = 0; i < piece.size; ++i) {
                const Key candidate = Traits::key(piece.scores[i]) >> kLastShift;
                if (candidate > prefix && candidate <= next) {
                    next = candidate;
                    last = piece.first + i;
                }
            }
        }
        if (last < 0) return {std::numeric_limits<typename Traits::Value>::infinity(), 0};
        return {value_of(next), last + 1};
    }

    std::vector<Piece<Score>> pieces_;
    const ParallelFor& parallel_for_;
    std::int64_t size_ = 0;
    std::vector<Counter> bins_;  // [pieces, kBins]
    std::array<std::int64_t, kBins> merged_{};
};

}  // namespace lpaf::cpu
