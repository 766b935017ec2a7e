// Exact selection of the share of scores to keep in one pass: a sample brackets the last kept entry. No
// torch.
//
// Two entries of a sorted sample enclose the wanted rank with near certainty. One pass counts the entries
// above the bracket and lists those inside it, a few percent; among these the wanted one is found by sorting
// partly. The counts tell whether it was inside: if not, or if too many entries tie, there is no answer here.
// The sample decides how fast an answer is found, never what it is.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/score_key.h"

namespace lpaf::cpu {

// What a block of entries holds, by the order of their keys.
template <class Key>
struct BracketCounts {
    std::uint32_t above = 0, at_high = 0, at_low = 0;
    Key highest = 0, lowest = std::numeric_limits<Key>::max();
};

// inside[i] = whether low < key of scores[i] < high.
template <class Score>
LPAF_MULTIVERSION BracketCounts<typename ScoreKey<Score>::Key> compare_with_bracket(
    const Score* __restrict scores, std::size_t size, typename ScoreKey<Score>::Key low,
    typename ScoreKey<Score>::Key high, std::uint8_t* __restrict inside) {
    using Key = typename ScoreKey<Score>::Key;
    BracketCounts<Key> counts;
    Key above = 0, at_high = 0, at_low = 0, highest = 0, lowest = std::numeric_limits<Key>::max();
    for (std::size_t i = 0; i < size; ++i) {
        const Key key = ScoreKey<Score>::key(scores[i]);
        above += key > high;
        at_high += key == high;
        at_low += key == low;
        highest = std::max(highest, key);
        lowest = std::min(lowest, key);
        inside[i] = static_cast<std::uint8_t>((key > low) & (key < high));
    }
    counts.above = static_cast<std::uint32_t>(above);
    counts.at_high = static_cast<std::uint32_t>(at_high);
    counts.at_low = static_cast<std::uint32_t>(at_low);
    counts.highest = highest;
    counts.lowest = lowest;
    return counts;
}

// Bit i of the result is flags[i], 0 or 1, for 64 flags (on a little-endian machine).
inline std::uint64_t pack_flags(const std::uint8_t* flags) {
    std::uint64_t bits = 0;
    for (int byte = 0; byte < 8; ++byte) {
        std::uint64_t eight = 0;
        std::memcpy(&eight, flags + 8 * byte, 8);
        // Each product term moves one flag into the top byte; no two meet, so nothing carries.
        bits |= ((eight * 0x0102040810204080u) >> 56) << (8 * byte);
    }
    return bits;
}

// Selects from one list of spans without weights; `ParallelFor` as for RadixSelect.
template <class Score, class ParallelFor>
class BracketSelect {
  public:
    using Traits = ScoreKey<Score>;
    using Key = typename Traits::Key;
    using Threshold = KeepThreshold<typename Traits::Value>;

    // Fewer entries than this are not worth a sample.
    static constexpr std::int64_t kMinSize = 1 << 13;

    BracketSelect(std::span<const ScoreSpan<Score>> spans, int threads, const ParallelFor& parallel_for)
        : pieces_(cut(spans, threads)), found_(pieces_.size()), parallel_for_(parallel_for) {
        if (!pieces_.empty()) size_ = pieces_.back().first + pieces_.back().size;
    }

    // The threshold that keeps `kept` entries, 0 < kept < size; nothing if the bracket missed it.
    // Throws InvalidEntryError for NaN scores.
    std::optional<Threshold> run(std::int64_t kept) {
        choose_bracket(kept);
        parallel_for_(static_cast<std::int64_t>(pieces_.size()),
                      [this](std::int64_t i) { compare(static_cast<std::size_t>(i)); });
        refuse_nans();
        for (const Found& found : found_) {
            if (found.overflow) return std::nullopt;
        }
        std::int64_t left = kept - count([](const Found& found) { return found.above; });
        if (left <= 0) return std::nullopt;
        const std::int64_t at_high = count([](const Found& found) { return found.at_high; });
        if (left <= at_high) return threshold_at(high_, left, &Found::at_high);
        left -= at_high;
        const std::int64_t inside = count([](const Found& found) { return found.listed; });
        if (left <= inside) return threshold_inside(left);
        left -= inside;
        const std::int64_t at_low =
            high_ == low_ ? 0 : count([](const Found& found) { return found.at_low; });
        if (left <= at_low) return threshold_at(low_, left, &Found::at_low);
        return std::nullopt;
    }

  private:
    static constexpr std::int64_t kMinSample = 512, kMaxSample = 1 << 13;
    static constexpr std::int64_t kSampleShare = 128;  // of the entries, between the two
    static constexpr double kDeviations = 3;           // by which the bracket is wider than luck
    static constexpr std::size_t kBlock = 512;
    static constexpr std::int64_t kTieBlock = 512;
    static constexpr std::int64_t kInsideShare = 4;  // more of a piece than this part overflows

    // What one piece holds.
    struct Found {
        std::int64_t above = 0, at_high = 0, at_low = 0;
        std::unique_ptr<std::uint32_t[]> inside;  // positions in the piece, rising
        std::size_t listed = 0;
        bool overflow = false, nan = false;

        std::span<const std::uint32_t> listing() const { return {inside.get(), listed}; }
    };

    template <class Field>
    std::int64_t count(const Field& field) const {
        std::int64_t sum = 0;
        for (const Found& found : found_) sum += static_cast<std::int64_t>(field(found));
        return sum;
    }

    // One entry at a drawn place of each of the sample's equal shares of the concatenation.
    std::vector<Key> sample(std::int64_t count) const {
        std::vector<Key> keys(static_cast<std::size_t>(count));
        std::uint64_t state = 0x9E3779B97F4A7C15u;
        const double share = static_cast<double>(size_) / static_cast<double>(count);
        auto piece = pieces_.begin();
        for (std::int64_t i = 0; i < count; ++i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            const double place =
                (static_cast<double>(i) + static_cast<double>(state >> 32) * 0x1p-32) * share;
            const std::int64_t index = std::min(static_cast<std::int64_t>(place), size_ - 1);
            while (index >= piece->first + piece->size) ++piece;
            keys[static_cast<std::size_t>(i)] = Traits::key(piece->scores[index - piece->first]);
        }
        return keys;
    }

    void choose_bracket(std::int64_t kept) {
        const std::int64_t count = std::clamp(size_ / kSampleShare, kMinSample, kMaxSample);
        std::vector<Key> keys = sample(count);
        const double share = static_cast<double>(kept) / static_cast<double>(size_);
        const double drawn = static_cast<double>(count);
        const double middle = share * drawn;
        const double margin = kDeviations * std::sqrt(drawn * share * (1 - share)) + 2;
        const auto begin = keys.begin();
        const auto falling = std::greater<Key>();
        high_ = std::numeric_limits<Key>::max();
        low_ = 0;
        if (middle - margin >= 0) {
            const auto place = begin + static_cast<std::ptrdiff_t>(middle - margin);
            std::nth_element(begin, place, keys.end(), falling);
            high_ = *place;
        }
        if (middle + margin < drawn) {
            const auto place = begin + static_cast<std::ptrdiff_t>(middle + margin);
            std::nth_element(begin, place, keys.end(), falling);
            low_ = *place;
        }
    }

    void compare(std::size_t position) {
        const Piece<Score>& piece = pieces_[position];
        Found& found = found_[position];
        const auto size = static_cast<std::size_t>(piece.size);
        const std::size_t most = size / kInsideShare;
        // Room for one block more than the most: fullness is looked at once per block.
        found.inside = std::make_unique_for_overwrite<std::uint32_t[]>(most + kBlock);
        Key highest = 0, lowest = std::numeric_limits<Key>::max();
        std::uint32_t* const out = found.inside.get();
        std::size_t listed = 0;
        alignas(64) std::uint8_t inside[kBlock] = {};
        for (std::size_t begin = 0; begin < size; begin += kBlock) {
            const std::size_t block = std::min(kBlock, size - begin);
            const auto counts = compare_with_bracket(piece.scores + begin, block, low_, high_, inside);
            found.above += counts.above;
            found.at_high += counts.at_high;
            found.at_low += counts.at_low;
            highest = std::max(highest, counts.highest);
            lowest = std::min(lowest, counts.lowest);
            if (block < kBlock) std::fill(inside + block, inside + kBlock, std::uint8_t{0});
            found.overflow = found.overflow || listed > most;
            if (found.overflow) continue;
            for (std::size_t i = 0; i < block; i += 64) {
                for (std::uint64_t bits = pack_flags(inside + i); bits != 0; bits &= bits - 1) {
                    out[listed++] = static_cast<std::uint32_t>(begin + i) +
                                    static_cast<std::uint32_t>(std::countr_zero(bits));
                }
            }
        }
        found.listed = listed;
        // Keys of NaN lie beyond those of the infinities.
        found.nan = highest > Traits::kInfinity || lowest < Traits::kMinusInfinity;
    }

    void refuse_nans() const {
        std::vector<std::uint8_t> nan(found_.size());
        std::transform(found_.begin(), found_.end(), nan.begin(),
                       [](const Found& found) { return found.nan; });
        refuse_nan<Score>(pieces_, nan);
    }

    // The bracket's own key is the value: the n-th entry (from 1) that equals it is the last kept one.
    Threshold threshold_at(Key key, std::int64_t n, std::int64_t Found::* ties) const {
        std::size_t position = 0;
        while (found_[position].*ties < n) n -= found_[position++].*ties;
        const Piece<Score>& piece = pieces_[position];
        const auto ties_in = [&piece, key](std::int64_t begin, std::int64_t end) {
            std::int64_t count = 0;
            for (std::int64_t i = begin; i < end; ++i) count += Traits::key(piece.scores[i]) == key;
            return count;
        };
        std::int64_t i = 0;
        for (std::int64_t found = 0; (found = ties_in(i, std::min(i + kTieBlock, piece.size))) < n;
             i += kTieBlock) {
            n -= found;
        }
        while (Traits::key(piece.scores[i]) != key || --n > 0) ++i;
        return {Traits::value(key), piece.first + i + 1};
    }

    // The n-th entry (from 1) of those inside the bracket is the last kept one.
    Threshold threshold_inside(std::int64_t n) const {
        std::vector<Key> keys;
        keys.reserve(static_cast<std::size_t>(count([](const Found& found) { return found.listed; })));
        for (std::size_t position = 0; position < pieces_.size(); ++position) {
            for (const std::uint32_t i : found_[position].listing()) {
                keys.push_back(Traits::key(pieces_[position].scores[i]));
            }
        }
        std::vector<Key> ranked = keys;
        const auto last = ranked.begin() + static_cast<std::ptrdiff_t>(n - 1);
        std::nth_element(ranked.begin(), last, ranked.end(), std::greater<Key>());
        const Key key = *last;
        std::int64_t ties =
            n - std::count_if(keys.begin(), keys.end(), [key](Key other) { return other > key; });
        auto candidate = keys.begin();
        for (std::size_t position = 0;; ++position) {
            for (const std::uint32_t i : found_[position].listing()) {
                if (*candidate++ == key && --ties == 0)
                    return {Traits::value(key), pieces_[position].first + i + 1};
            }
        }
    }

    std::vector<Piece<Score>> pieces_;
    std::vector<Found> found_;
    const ParallelFor& parallel_for_;
    std::int64_t size_ = 0;
    Key low_ = 0, high_ = 0;
};

}  // namespace lpaf::cpu
