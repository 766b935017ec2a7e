// Scores as numbers that sort: what the selections of keep_threshold share. No torch.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

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

// A unit of parallel work: consecutive entries of one span.
template <class Score>
struct Piece {
    const Score* scores;
    const std::int64_t* weights;
    std::int64_t size;
    std::int64_t first;  // index of its first entry in the concatenation
    std::size_t span;    // position of its span
};

// Cuts spans into pieces of about equal size, a multiple of `threads` for each span that is worth sharing
// out.
template <class Score>
std::vector<Piece<Score>> cut(std::span<const ScoreSpan<Score>> spans, int threads) {
    constexpr std::int64_t kMinPiece = 1 << 14;
    constexpr std::int64_t kMaxPiece = 1 << 18;
    const auto divide_up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    std::vector<Piece<Score>> pieces;
    std::int64_t first = 0;
    for (std::size_t position = 0; position < spans.size(); ++position) {
        const ScoreSpan<Score>& span = spans[position];
        std::int64_t count = std::max<std::int64_t>(divide_up(span.size, kMaxPiece),
                                                    std::min<std::int64_t>(threads, span.size / kMinPiece));
        if (count > threads) count = divide_up(count, threads) * threads;
        const std::int64_t step = count == 0 ? 0 : divide_up(span.size, count);
        for (std::int64_t begin = 0; begin < span.size; begin += step) {
            const std::int64_t* weights = span.weights == nullptr ? nullptr : span.weights + begin;
            pieces.push_back(
                {span.scores + begin, weights, std::min(step, span.size - begin), first + begin, position});
        }
        first += span.size;
    }
    return pieces;
}

// Throws for the first piece whose flag is set.
template <class Score>
void refuse_nan(std::span<const Piece<Score>> pieces, std::span<const std::uint8_t> found) {
    const auto first = std::find(found.begin(), found.end(), std::uint8_t{1});
    if (first == found.end()) return;
    throw InvalidEntryError(pieces[static_cast<std::size_t>(first - found.begin())].span, "NaN");
}

// How many of `total` entries (or how much of their weight) may be kept.
inline std::int64_t keep_target(double keep, std::int64_t total, bool weighted) {
    const double amount = static_cast<double>(total);
    const double wanted = std::floor(weighted ? keep * amount : keep * amount + 0.5);
    if (keep >= 1.0 || wanted >= amount) return total;
    return wanted <= 0.0 ? 0 : static_cast<std::int64_t>(wanted);
}

}  // namespace lpaf::cpu
