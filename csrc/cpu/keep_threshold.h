// Exact selection of the share of scores to keep: a most-significant-digit radix select. No torch.
//
// Scores are mapped to unsigned keys of the same order. A histogram of the keys' leading digit tells in which
// bin the last kept entry lies; the next digit is counted among the entries of that bin only, and so on until
// the key is known. Each round reads the scores once, or, once a bin holds few entries, only those entries.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/scalar_types.h"

namespace lpaf::cpu {

// One tensor of scores, and how often each entry counts (null where every entry counts once).
template <class Score>
struct ScoreSpan {
    const Score* scores;
    const std::int64_t* weights;
    std::int64_t size;
};

// Entry i of the concatenated spans is kept if score > value, or score == value and i < tie_index.
template <class Value>
struct KeepThreshold {
    Value value;
    std::int64_t tie_index;
};

// Scores or weights that no selection is defined for; `span` is the offender's position in the list.
struct InvalidEntryError : std::invalid_argument {
    InvalidEntryError(std::size_t span_position, const std::string& what)
        : std::invalid_argument(what), span(span_position) {}
    std::size_t span;
};

// Order-preserving map of scores to unsigned keys. 16-bit scores are left-aligned in 32 bits.
template <class Score>
struct ScoreKey {
    static constexpr bool kIs16Bit = sizeof(Score) == 2;
    using Key = std::conditional_t<sizeof(Score) == 8, std::uint64_t, std::uint32_t>;
    using Value = std::conditional_t<sizeof(Score) == 8, double, float>;
    static constexpr int kKeyBits = std::numeric_limits<Key>::digits;
    static constexpr int kUsedBits = kIs16Bit ? 16 : kKeyBits;
    static constexpr Key kSign = Key{1} << (kKeyBits - 1);

    static Key bits(Score score) {
        if constexpr (kIs16Bit) {
            return static_cast<Key>(score.bits) << 16;
        } else {
            return std::bit_cast<Key>(score);
        }
    }

    // -0.0 becomes 0.0; then negative numbers reverse their order and positive ones move above them.
    static Key key(Score score) {
        const Key raw = bits(score);
        const Key canonical = raw == kSign ? Key{0} : raw;
        const Key negative = Key{0} - (canonical >> (kKeyBits - 1));
        return canonical ^ (negative | kSign);
    }

    static Value value(Key key) {
        const Key raw = (key & kSign) != 0 ? key ^ kSign : static_cast<Key>(~key);
        if constexpr (kIs16Bit) {
            return to_float(Score{static_cast<std::uint16_t>(raw >> 16)});
        } else {
            return std::bit_cast<Value>(raw);
        }
    }

    static constexpr Key infinity_bits() {
        if constexpr (std::is_same_v<Score, Half>) {
            return Key{0x7C00} << 16;
        } else if constexpr (sizeof(Score) == 8) {
            return std::bit_cast<Key>(std::numeric_limits<double>::infinity());
        } else {
            return static_cast<Key>(std::bit_cast<std::uint32_t>(std::numeric_limits<float>::infinity()));
        }
    }
    static constexpr Key kInfinity = infinity_bits() | kSign;
    static constexpr Key kMinusInfinity = static_cast<Key>(~(infinity_bits() | kSign));
    static bool is_nan(Score score) { return (bits(score) & ~kSign) > infinity_bits(); }
};

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
        : spans_(spans), parallel_for_(parallel_for) {
        for (std::size_t position = 0; position < spans.size(); ++position) {
            add_pieces(position, std::max(threads, 1));
        }
        bins_.resize(pieces_.size() * kBins);
    }

    Threshold run(double keep) {
        using Value = typename Traits::Value;
        if constexpr (Weighted) check_weights();
        count_digits(0, 0, nullptr);
        check_nan();
        const std::int64_t total = std::accumulate(merged_.begin(), merged_.end(), std::int64_t{0});
        std::int64_t remaining = target(keep, total);
        if (remaining <= 0) return {std::numeric_limits<Value>::infinity(), 0};
        if (remaining >= total) return {-std::numeric_limits<Value>::infinity(), size_};

        Key prefix = 0;
        std::size_t digit = 0;
        for (int level = 0;; ++level) {
            digit = choose_digit(remaining);
            prefix = static_cast<Key>(prefix << width(level)) | static_cast<Key>(digit);
            if (level + 1 == kLevels) break;
            const std::int64_t inside = merged_[digit];
            const bool gather = !Weighted && !gathered_ && inside <= size_ / kGatherShare;
            count_digits(level + 1, prefix, gather ? &digit : nullptr);
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
    static constexpr std::int64_t kMinPiece = 1 << 14;
    static constexpr std::int64_t kMaxPiece = 1 << 18;
    static constexpr std::int64_t kGatherShare = 4;  // gather once at most this part of the entries is left
    static constexpr std::int64_t kFewCandidates = 1 << 16;
    static constexpr std::size_t kBlock = 512;
    // Equal neighbours would make each increment wait for the one before it: four copies take turns.
    static constexpr std::size_t kCopies = 4;

    using Counter = std::conditional_t<Weighted, std::int64_t, std::uint32_t>;

    // A unit of parallel work: consecutive entries of one span.
    struct Piece {
        const Score* scores;
        const std::int64_t* weights;
        std::int64_t size;
        std::int64_t first;                     // index of its first entry in the concatenation
        std::size_t span;                       // position of its span
        std::vector<std::uint32_t> candidates;  // entries that still count, once gathered
    };

    static constexpr int width(int level) {
        return std::min(kDigitBits, Traits::kKeyBits - level * kDigitBits);
    }
    static constexpr int shift(int level) { return Traits::kKeyBits - level * kDigitBits - width(level); }
    static constexpr int kLastShift = shift(kLevels - 1);

    static typename Traits::Value value_of(Key prefix) {
        return Traits::value(static_cast<Key>(prefix << kLastShift));
    }

    void add_pieces(std::size_t position, int threads) {
        const ScoreSpan<Score>& span = spans_[position];
        const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
        std::int64_t count = std::max<std::int64_t>(divide_up(span.size, kMaxPiece),
                                                    std::min<std::int64_t>(threads, span.size / kMinPiece));
        if (count > threads) count = divide_up(count, threads) * threads;
        const std::int64_t step = count == 0 ? 0 : divide_up(span.size, count);
        for (std::int64_t begin = 0; begin < span.size; begin += step) {
            const std::int64_t size = std::min(step, span.size - begin);
            const std::int64_t* weights = span.weights == nullptr ? nullptr : span.weights + begin;
            pieces_.push_back({span.scores + begin, weights, size, size_ + begin, position, {}});
        }
        size_ += span.size;
    }

    template <class Task>
    void for_each_piece(const Task& task) {
        parallel_for_(static_cast<std::int64_t>(pieces_.size()), task);
    }

    Counter* bins_of(std::int64_t piece) { return bins_.data() + static_cast<std::size_t>(piece) * kBins; }

    void check_weights() {
        double total = 0;
        for (const Piece& piece : pieces_) {
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

    static void count_piece(const Piece& piece, bool gathered, int level, Key prefix, Counter* bins) {
        alignas(64) Counter copies[kCopies][kBins + 1] = {};
        std::uint32_t digit[kBlock];
        Score picked[kBlock];
        const std::size_t size = gathered ? piece.candidates.size() : static_cast<std::size_t>(piece.size);
        for (std::size_t begin = 0; begin < size; begin += kBlock) {
            const std::size_t block = std::min(kBlock, size - begin);
            const Score* scores = piece.scores + begin;
            if (gathered) {
                const std::uint32_t* index = piece.candidates.data() + begin;
                for (std::size_t i = 0; i < block; ++i) picked[i] = piece.scores[index[i]];
                scores = picked;
            }
            const bool all_equal = extract_digits(scores, block, shift(level), width(level), prefix,
                                                  static_cast<std::uint32_t>(kBins), digit);
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

    // Count digit `level` of the entries whose leading digits are `prefix`. If `gather_digit` is given (the
    // last digit of `prefix`), list those entries on the way, so that later rounds touch only them.
    void count_digits(int level, Key prefix, const std::size_t* gather_digit) {
        const auto count = [&](std::int64_t i) {
            Piece& piece = pieces_[static_cast<std::size_t>(i)];
            Counter* bins = bins_of(i);
            if (gather_digit != nullptr) gather(piece, level - 1, prefix, bins[*gather_digit]);
            count_piece(piece, gathered_ || gather_digit != nullptr, level, prefix, bins);
        };
        if (gathered_ && candidates_ <= kFewCandidates) {
            // Waking and awaiting threads would take longer.
            for (std::int64_t i = 0; i < static_cast<std::int64_t>(pieces_.size()); ++i) count(i);
        } else {
            for_each_piece(count);
        }
        if (gather_digit != nullptr) {
            candidates_ = merged_[*gather_digit];
            gathered_ = true;
        }
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
            const Piece& piece = pieces_[static_cast<std::size_t>(i)];
            bool any = false;
            for (std::int64_t j = 0; j < piece.size; ++j) any |= Traits::is_nan(piece.scores[j]);
            found[static_cast<std::size_t>(i)] = any;
        });
        const auto first = std::find(found.begin(), found.end(), std::uint8_t{1});
        if (first == found.end()) return;
        throw InvalidEntryError(pieces_[static_cast<std::size_t>(first - found.begin())].span, "NaN");
    }

    // How many entries (Weighted: how much weight) may be kept.
    std::int64_t target(double keep, std::int64_t total) const {
        const double amount = static_cast<double>(total);
        const double wanted = std::floor(Weighted ? keep * amount : keep * amount + 0.5);
        if (keep >= 1.0 || wanted >= amount) return total;
        return wanted <= 0.0 ? 0 : static_cast<std::int64_t>(wanted);
    }

    // The bin that holds the last kept entry (Weighted: the first entry that does not fit); `remaining` loses
    // what the bins above it take.
    std::size_t choose_digit(std::int64_t& remaining) const {
        std::size_t bin = kBins - 1;
        while (Weighted ? merged_[bin] <= remaining : merged_[bin] < remaining) remaining -= merged_[bin--];
        return bin;
    }

    // List the `count` entries of a piece whose digits up to `level` are `prefix`.
    static void gather(Piece& piece, int level, Key prefix, Counter count) {
        const int low = shift(level);
        // Every index is stored and the position moves on a match, so one spare place is written.
        piece.candidates.resize(static_cast<std::size_t>(count) + 1);
        std::uint32_t* out = piece.candidates.data();
        std::size_t found = 0;
        bool match[kBlock];
        for (std::int64_t begin = 0; begin < piece.size; begin += kBlock) {
            const auto block = static_cast<std::size_t>(std::min<std::int64_t>(kBlock, piece.size - begin));
            for (std::size_t j = 0; j < block; ++j) {
                match[j] = (Traits::key(piece.scores[begin + static_cast<std::int64_t>(j)]) >> low) == prefix;
            }
            for (std::size_t j = 0; j < block; ++j) {
                out[found] = static_cast<std::uint32_t>(begin) + static_cast<std::uint32_t>(j);
                found += match[j];
            }
        }
        piece.candidates.resize(found);
    }

    static bool is_tie(const Piece& piece, std::int64_t i, Key prefix) {
        return (Traits::key(piece.scores[i]) >> kLastShift) == prefix;
    }

    // Index of the n-th entry (from 1) whose key is `prefix`.
    std::int64_t nth_tie(Key prefix, std::size_t digit, std::int64_t n) {
        std::size_t position = 0;
        while (std::int64_t{bins_of(static_cast<std::int64_t>(position))[digit]} < n) {
            n -= bins_of(static_cast<std::int64_t>(position++))[digit];
        }
        const Piece& piece = pieces_[position];
        if (gathered_) {
            for (const std::uint32_t i : piece.candidates) {
                if (is_tie(piece, i, prefix) && --n == 0) return piece.first + i;
            }
        }
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
            const Piece& piece = pieces_[position];
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
        for (const Piece& piece : pieces_) {
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

    std::span<const ScoreSpan<Score>> spans_;
    const ParallelFor& parallel_for_;
    std::vector<Piece> pieces_;
    std::int64_t size_ = 0;
    bool gathered_ = false;
    std::int64_t candidates_ = 0;  // how many entries were gathered
    std::vector<Counter> bins_;    // [pieces, kBins]
    std::array<std::int64_t, kBins> merged_{};
};

// Keep floor(keep * n + 0.5) of the n entries of all spans together or, if they are weighted, the longest
// prefix in (score descending, index ascending) order whose weight is at most keep * total weight.
// Throws InvalidEntryError for NaN scores, weights below 1 and weights whose sum overflows.
template <class Score, class ParallelFor>
auto keep_threshold(std::span<const ScoreSpan<Score>> spans, bool weighted, double keep, int threads,
                    const ParallelFor& parallel_for) {
    if (weighted) return RadixSelect<Score, true, ParallelFor>(spans, threads, parallel_for).run(keep);
    return RadixSelect<Score, false, ParallelFor>(spans, threads, parallel_for).run(keep);
}

}  // namespace lpaf::cpu
