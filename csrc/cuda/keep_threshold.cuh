// Exact selection of the share of scores to keep on the GPU: a most-significant-digit radix select. No torch.
//
// Scores are mapped to unsigned ranks, lower for higher scores. One launch per digit of the rank: every block
// counts the digit over one chunk of one tensor, among the entries whose leading digits are those chosen so
// far. The block that finishes last for a selection chooses its digit: the one at which the counts, added up
// from the best, reach the last kept entry. Every chunk keeps its counts of the last digit, so that the entry
// is then found among the ties by reading one chunk.
//
// With weights the counts are sums of weights, and the entry looked for is the first that does not fit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/block_program.cuh"
#include "cuda/pack.cuh"

namespace lpaf::cuda::radix_select {

using Count = unsigned long long;

constexpr int kDigitBits = 11;
constexpr int kMaxBins = 1 << kDigitBits;
constexpr int kSelectThreads = 256;
constexpr int kMinChunk = 1 << 12;                    // entries of one block
constexpr int kMaxChunk = 1 << 15;                    // its counts fit in 16 bits
constexpr int kSegment = kMaxChunk / kSelectThreads;  // entries counted as one when a chunk is searched
constexpr int kEnoughBlocks = 1024;                   // with fewer, chunks are shorter
constexpr int kTableSpans = 256;                      // tensors that one launch of Prepare describes
constexpr Count kMaxTotal = Count{1} << 62;           // weights may add up to this

// Formats of scores, read as bits.

struct Float32 {
    using Bits = std::uint32_t;
    using Key = std::uint32_t;
    using Value = float;
    static constexpr Key kInfinity = 0x7F800000u;
    LPAF_DEVICE static float value(Key bits) { return from_bits<float>(bits); }
};

struct Float64 {
    using Bits = std::uint64_t;
    using Key = std::uint64_t;
    using Value = double;
    static constexpr Key kInfinity = 0x7FF0000000000000u;
    LPAF_DEVICE static double value(Key bits) { return from_bits<double>(bits); }
};

struct BFloat16 {
    using Bits = std::uint16_t;
    using Key = std::uint32_t;
    using Value = float;
    static constexpr Key kInfinity = 0x7F80u;
    LPAF_DEVICE static float value(Key bits) { return from_bits<float>(bits << 16); }
};

struct Float16 {
    using Bits = std::uint16_t;
    using Key = std::uint32_t;
    using Value = float;
    static constexpr Key kInfinity = 0x7C00u;
    LPAF_DEVICE static float value(Key bits) {
        const Key magnitude = bits & 0x7FFFu;
        if (magnitude < 0x0400u) {  // a subnormal is a multiple of 2^-24
            const float size = static_cast<float>(magnitude) * 0x1p-24f;
            return bits == magnitude ? size : -size;
        }
        const Key exponent = magnitude < kInfinity ? 127u - 15u : 255u - 31u;
        return from_bits<float>((bits & 0x8000u) << 16 | ((magnitude << 13) + (exponent << 23)));
    }
};

// Ranks in the order of falling scores, and their digits from the most significant one.
template <class Format>
struct Rank {
    using Key = typename Format::Key;
    static constexpr int kBits = 8 * static_cast<int>(sizeof(typename Format::Bits));
    static constexpr int kLevels = (kBits + kDigitBits - 1) / kDigitBits;
    static constexpr Key kSign = Key{1} << (kBits - 1);
    static constexpr Key kZero = kSign - 1;  // the rank of 0.0 and -0.0

    static constexpr int width(int level) { return std::min(kDigitBits, kBits - level * kDigitBits); }
    static constexpr int shift(int level) { return kBits - level * kDigitBits - width(level); }

    // That of a NaN, and of nothing else, is above the format's infinity.
    LPAF_DEVICE static Key magnitude(Key bits) { return bits & (kSign - 1); }

    // Positive numbers lie below the rank of zero, negative ones above it, each by its magnitude.
    LPAF_DEVICE static Key of(Key bits) { return (bits & kSign) != 0 ? bits - kSign + kZero : kZero - bits; }
    LPAF_DEVICE static typename Format::Value value(Key rank) {
        return Format::value(rank > kZero ? rank - kZero + kSign : kZero - rank);
    }
};

// One tensor of scores, and how often each entry counts (null where every entry counts once).
struct ScoreSpan {
    const void* scores;
    const std::int64_t* weights;
    std::int64_t size;
};

// What the launches share in device memory.

// The work of one block.
struct Chunk {
    const void* scores;
    const std::int64_t* weights;
    std::int64_t first;  // index of its first entry in the selection
    std::uint32_t size;
    std::uint32_t selection;
};

// Where a tensor lies in its selection.
struct Extent {
    std::int64_t first;
    std::int64_t size;
};

struct Selection {
    Count bins[kMaxBins];  // of the current digit
    Count max_weight;
    std::int64_t first_chunk, chunks;
    std::int64_t first_span, spans;
    std::int64_t entries;
    Count target;         // the sum of the counts, from the best entry, that the threshold reaches
    Count needed;         // of it, what the entries ranked before the chosen digits leave
    Count prefix;         // the digits chosen so far
    unsigned arrived;     // blocks that have counted the current digit
    unsigned is_invalid;  // a score is NaN or a weight is out of range
    unsigned is_settled;  // known without another digit
};

struct Workspace {
    Selection* selections;
    Chunk* chunks;
    Extent* extents;
    void* tie_counts;  // [chunks, bins of the last digit]
};

// Writes the chunks, extents and selections of up to kTableSpans tensors, one per block.
class Prepare {
  public:
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerProcessor = 1;
    struct Shared {};
    struct Source {
        ScoreSpan span;
        std::int64_t first;  // index of its first entry in the selection
        std::int64_t first_chunk, chunks;
    };
    struct Arguments {
        Workspace workspace;
        int score_bytes;
        int chunk;  // entries of one
        bool across;
        std::int64_t spans, chunks, entries;  // of the whole list
        std::int64_t first_span;
        Source sources[kTableSpans];
    };

    LPAF_DEVICE Prepare(const Arguments& arguments, Shared&, std::int64_t block)
        : arguments_(arguments), source_(arguments.sources[block]), span_(arguments.first_span + block) {}

    template <class Each>
    LPAF_DEVICE void run(const Each& each) {
        each([this](int thread) {
            write_chunks(thread);
            if (!arguments_.across || span_ == 0) write_selection(thread);
        });
    }

  private:
    LPAF_DEVICE void write_chunks(int thread) {
        const ScoreSpan& span = source_.span;
        if (thread == 0) arguments_.workspace.extents[span_] = {source_.first, span.size};
        for (std::int64_t i = thread; i < source_.chunks; i += kThreads) {
            const std::int64_t begin = i * arguments_.chunk, rest = span.size - begin;
            arguments_.workspace.chunks[source_.first_chunk + i] = {
                static_cast<const char*>(span.scores) + begin * arguments_.score_bytes,
                span.weights == nullptr ? nullptr : span.weights + begin, source_.first + begin,
                static_cast<std::uint32_t>(rest < arguments_.chunk ? rest : arguments_.chunk),
                static_cast<std::uint32_t>(arguments_.across ? 0 : span_)};
        }
    }

    LPAF_DEVICE void write_selection(int thread) {
        Selection& selection = arguments_.workspace.selections[span_];
        for (int bin = thread; bin < kMaxBins; bin += kThreads) selection.bins[bin] = 0;
        if (thread != 0) return;
        const bool across = arguments_.across;
        const std::int64_t entries = across ? arguments_.entries : source_.span.size;
        selection.max_weight = kMaxTotal / static_cast<Count>(entries > 0 ? entries : 1);
        selection.first_chunk = source_.first_chunk;
        selection.chunks = across ? arguments_.chunks : source_.chunks;
        selection.first_span = span_;
        selection.spans = across ? arguments_.spans : 1;
        selection.entries = entries;
        selection.prefix = 0;
        selection.arrived = selection.is_invalid = selection.is_settled = 0;
    }

    const Arguments& arguments_;
    const Source& source_;
    const std::int64_t span_;
};

template <class Value>
struct SelectArguments {
    Workspace workspace;
    double keep;
    Value* value;
    std::int64_t* tie_index;
};

// Counts one digit over one chunk; the last block of a selection chooses the digit and, at the last level,
// finds the entry and writes the result.
template <class Format, bool kWeighted, int kLevel>
class SelectDigit {
  public:
    using Key = typename Format::Key;
    using Value = typename Format::Value;
    using Amount = std::conditional_t<kWeighted, Count, unsigned>;         // of one chunk
    using TieCount = std::conditional_t<kWeighted, Count, std::uint16_t>;  // in the workspace

    static constexpr int kThreads = kSelectThreads;
    static constexpr int kBlocksPerProcessor = kWeighted ? 3 : 4;
    static constexpr int kBins = 1 << Rank<Format>::width(kLevel);
    static constexpr int kCounters = std::max(kBins, kThreads);
    static constexpr int kGroup = 16;
    static constexpr int kGroups = kThreads / kGroup;

    using Arguments = SelectArguments<Value>;
    struct Shared {
        Amount bins[kCounters];
        Count sums[kThreads];
        Count groups[kGroups];
        Count needed;
        std::int64_t position;
        std::int64_t tie_index;
        Value value;
        unsigned is_invalid, is_last, is_settled;
    };

    LPAF_DEVICE SelectDigit(const Arguments& arguments, Shared& shared, std::int64_t block)
        : arguments_(arguments),
          shared_(shared),
          block_(block),
          chunk_(arguments.workspace.chunks[block]),
          selection_(arguments.workspace.selections[chunk_.selection]) {}

    template <class Each>
    LPAF_DEVICE void run(const Each& each) {
        if (!kIsFirst && selection_.is_settled != 0) return;
        each([this](int thread) { clear(thread); });
        each([this](int thread) { count_chunk(thread); });
        each([this](int thread) { add_to_selection(thread); });
        each([this](int thread) { arrive(thread); });
        if (shared_.is_last == 0) return;

        const auto bin = [this](std::int64_t i) { return selection_.bins[i]; };
        sum_slices(each, kBins, bin);
        if constexpr (kIsFirst) {
            each([this](int thread) { set_target(thread); });
            if (shared_.is_settled != 0) {
                each([this](int thread) { write_result(thread); });
                return;
            }
        }
        find_item(each, kBins, bin);
        if constexpr (kIsLast) {
            find_entry(each);
            each([this](int thread) { write_result(thread); });
        } else {
            each([this](int thread) { choose_digit(thread); });
        }
    }

  private:
    using Bits = typename Format::Bits;
    static constexpr int kShift = Rank<Format>::shift(kLevel);
    static constexpr int kWidth = Rank<Format>::width(kLevel);
    static constexpr bool kIsFirst = kLevel == 0;
    static constexpr bool kIsLast = kLevel + 1 == Rank<Format>::kLevels;
    static constexpr unsigned kNoBin = ~0u;
    static constexpr Value kInfinity = std::numeric_limits<Value>::infinity();
    static constexpr Value kNan = std::numeric_limits<Value>::quiet_NaN();

    static constexpr int kPackWidth = 16 / static_cast<int>(sizeof(Bits));
    // Packs that a thread loads at once: as many as its registers hold with their bins or weights.
    static constexpr int kBatch = kWeighted || kPackWidth > 4 ? 2 : 4;
    using ScorePack = Pack<Bits, kPackWidth>;

    // Shows each entry of a chunk to one thread: visit_pack(pack, index of its first entry, whether there is
    // one) is called on whole warps, visit(bits, index) for the few entries before and behind aligned packs.
    template <class VisitPack, class Visit>
    LPAF_DEVICE static void for_each_entry(const Chunk& chunk, int thread, const VisitPack& visit_pack,
                                           const Visit& visit) {
        const Bits* scores = in_global(static_cast<const Bits*>(chunk.scores));
        const int size = static_cast<int>(chunk.size);
        const auto address = reinterpret_cast<std::uintptr_t>(scores);
        const int to_aligned = static_cast<int>((0 - address) % sizeof(ScorePack) / sizeof(Bits));
        const int head = to_aligned < size ? to_aligned : size;
        const int packs = (size - head) / kPackWidth;
        const int tail = head + packs * kPackWidth;
        if (thread < head) visit(scores[thread], thread);
        if (thread < size - tail) visit(scores[tail + thread], tail + thread);

        const ScorePack* aligned = reinterpret_cast<const ScorePack*>(scores + head);
        int base = 0;
        for (; base + kBatch * kThreads <= packs; base += kBatch * kThreads) {
            ScorePack batch[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) batch[i] = aligned[base + i * kThreads + thread];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                visit_pack(batch[i], head + (base + i * kThreads + thread) * kPackWidth, true);
            }
        }
        for (; base < packs; base += kThreads) {
            const int pack = base + thread;
            const bool exists = pack < packs;
            visit_pack(exists ? aligned[pack] : ScorePack{}, head + pack * kPackWidth, exists);
        }
    }

    LPAF_DEVICE static Amount amount(const Chunk& chunk, int i) {
        if constexpr (kWeighted) {
            return static_cast<Amount>(chunk.weights[i]);
        } else {
            return 1;
        }
    }

    LPAF_DEVICE void clear(int thread) {
        for (int i = thread; i < kCounters; i += kThreads) shared_.bins[i] = 0;
        if (thread == 0) shared_.is_invalid = 0;
    }

    LPAF_DEVICE static unsigned bin_of(Key bits, Key prefix) {
        const Key leading = Rank<Format>::of(bits) >> kShift;
        if constexpr (!kIsFirst) {
            if (leading >> kWidth != prefix) return kNoBin;
        }
        return static_cast<unsigned>(leading) & (kBins - 1);
    }

    LPAF_DEVICE void count_chunk(int thread) {
        const Key prefix = static_cast<Key>(selection_.prefix);
        const Count max_weight = selection_.max_weight;
        Key largest = 0;
        bool is_invalid = false;
        const auto check = [&](Key bits, int i) {
            const Key magnitude = Rank<Format>::magnitude(bits);
            largest = magnitude > largest ? magnitude : largest;
            if constexpr (kWeighted) is_invalid |= amount(chunk_, i) - 1 >= max_weight;
        };
        const auto count = [&](unsigned bin, int i) {
            if (bin != kNoBin) atomic_add(&shared_.bins[bin], amount(chunk_, i));
        };
        const auto visit_pack = [&](const ScorePack& pack, int first, bool exists) {
            unsigned bins[kPackWidth];
            bool all_equal = true;
#pragma unroll
            for (int i = 0; i < kPackWidth; ++i) {
                bins[i] = exists ? bin_of(pack.entries[i], prefix) : kNoBin;
                all_equal &= bins[i] == bins[0];
                if (kIsFirst && exists) check(pack.entries[i], first + i);
            }
            if (warp_agrees(bins[0], all_equal)) {  // else equal scores would wait for each other
                if (bins[0] == kNoBin) return;
                Amount sum = 0;
#pragma unroll
                for (int i = 0; i < kPackWidth; ++i) sum += amount(chunk_, first + i);
                sum = warp_sum(sum);
                if (warp_leader()) atomic_add(&shared_.bins[bins[0]], sum);
            } else {
#pragma unroll
                for (int i = 0; i < kPackWidth; ++i) count(bins[i], first + i);
            }
        };
        for_each_entry(chunk_, thread, visit_pack, [&](Bits bits, int i) {
            if (kIsFirst) check(bits, i);
            count(bin_of(bits, prefix), i);
        });
        if (is_invalid || largest > Format::kInfinity) atomic_or(&shared_.is_invalid, 1u);
    }

    LPAF_DEVICE TieCount* tie_counts(std::int64_t chunk) const {
        return static_cast<TieCount*>(arguments_.workspace.tie_counts) + chunk * kBins;
    }

    LPAF_DEVICE void add_to_selection(int thread) {
        for (int bin = thread; bin < kBins; bin += kThreads) {
            const Amount sum = shared_.bins[bin];
            if constexpr (kIsLast) tie_counts(block_)[bin] = static_cast<TieCount>(sum);
            if (sum != 0) atomic_add(&selection_.bins[bin], Count{sum});
        }
        if (thread == 0 && shared_.is_invalid != 0) atomic_or(&selection_.is_invalid, 1u);
    }

    LPAF_DEVICE void arrive(int thread) {
        if (thread != 0) return;
        memory_fence();
        shared_.is_last = atomic_add(&selection_.arrived, 1u) + 1 == selection_.chunks;
        memory_fence();
        if (shared_.is_last != 0) selection_.arrived = 0;
        if constexpr (!kIsFirst) {
            if (shared_.is_last != 0) shared_.needed = selection_.needed;
        }
    }

    // Items that one thread adds up.
    LPAF_DEVICE static std::int64_t slice_of(std::int64_t items) { return (items + kThreads - 1) / kThreads; }

    // The first half of a search among the items 0, 1, ... for the one at which the sum of count_of(item)
    // reaches `needed`: each thread adds up a slice, some add up the slices of a group.
    template <class Each, class CountOf>
    LPAF_DEVICE void sum_slices(const Each& each, std::int64_t items, const CountOf& count_of) {
        each([&](int thread) {
            const std::int64_t begin = thread * slice_of(items), end = begin + slice_of(items);
            Count sum = 0;
            for (std::int64_t i = begin; i < end && i < items; ++i) sum += count_of(i);
            shared_.sums[thread] = sum;
        });
        each([this](int thread) {
            if (thread >= kGroups) return;
            Count sum = 0;
            for (int i = 0; i < kGroup; ++i) sum += shared_.sums[thread * kGroup + i];
            shared_.groups[thread] = sum;
        });
    }

    // The second half: sets `position` to that item and takes what comes before it from `needed`. Stays in
    // bounds even if another stream changes the scores meanwhile.
    template <class Each, class CountOf>
    LPAF_DEVICE void find_item(const Each& each, std::int64_t items, const CountOf& count_of) {
        each([&](int thread) {
            if (thread != 0) return;
            Count needed = shared_.needed;
            int group = 0;
            for (; group < kGroups - 1 && shared_.groups[group] < needed; ++group) {
                needed -= shared_.groups[group];
            }
            int slice = group * kGroup;
            for (const int last = slice + kGroup - 1; slice < last && shared_.sums[slice] < needed; ++slice) {
                needed -= shared_.sums[slice];
            }
            std::int64_t item = std::int64_t{slice} * slice_of(items);
            if (item >= items) item = items - 1;
            for (; item < items - 1; ++item) {
                const Count count = count_of(item);
                if (count >= needed) break;
                needed -= count;
            }
            shared_.needed = needed;
            shared_.position = item;
        });
    }

    LPAF_DEVICE void settle(Value value, std::int64_t tie_index) {
        shared_.value = value;
        shared_.tie_index = tie_index;
        shared_.is_settled = selection_.is_settled = 1;
    }

    LPAF_DEVICE void set_target(int thread) {
        if (thread != 0) return;
        shared_.is_settled = 0;
        if (selection_.is_invalid != 0) return settle(kNan, 0);
        Count total = 0;
        for (int group = 0; group < kGroups; ++group) total += shared_.groups[group];
        const double all = static_cast<double>(total);
        const double wanted = floor(rounded_product(arguments_.keep, all) + (kWeighted ? 0.0 : 0.5));
        if (wanted <= 0.0) return settle(kInfinity, 0);
        if (arguments_.keep >= 1.0 || wanted >= all) return settle(-kInfinity, selection_.entries);
        selection_.target = static_cast<Count>(wanted) + (kWeighted ? 1 : 0);
        shared_.needed = selection_.target;
    }

    LPAF_DEVICE void choose_digit(int thread) {
        for (int bin = thread; bin < kBins; bin += kThreads) selection_.bins[bin] = 0;
        if (thread != 0) return;
        selection_.prefix = selection_.prefix << kWidth | static_cast<Count>(shared_.position);
        selection_.needed = shared_.needed;
    }

    // The digits are known: find, among the entries that have them, the one that reaches `needed`.
    template <class Each>
    LPAF_DEVICE void find_entry(const Each& each) {
        const std::int64_t digit = shared_.position;
        const Key rank = static_cast<Key>(selection_.prefix << kWidth | static_cast<Count>(digit));

        const auto ties_of_chunk = [&](std::int64_t i) {
            return tie_counts(selection_.first_chunk + i)[digit];
        };
        sum_slices(each, selection_.chunks, ties_of_chunk);
        find_item(each, selection_.chunks, ties_of_chunk);
        const Chunk chunk = arguments_.workspace.chunks[selection_.first_chunk + shared_.position];

        each([this](int thread) { clear(thread); });
        each([&](int thread) { count_segments(chunk, rank, thread); });
        const auto ties_of_segment = [this](std::int64_t i) { return shared_.bins[i]; };
        sum_slices(each, kThreads, ties_of_segment);
        find_item(each, kThreads, ties_of_segment);
        const int segment = static_cast<int>(shared_.position) * kSegment;

        const auto ties_of_entry = [&](std::int64_t i) -> Count {
            const int entry = segment + static_cast<int>(i);
            if (entry >= static_cast<int>(chunk.size)) return 0;
            const Bits bits = static_cast<const Bits*>(chunk.scores)[entry];
            return Rank<Format>::of(bits) == rank ? amount(chunk, entry) : 0;
        };
        sum_slices(each, kSegment, ties_of_entry);
        find_item(each, kSegment, ties_of_entry);
        each([&](int thread) {
            if (thread == 0) set_threshold(rank, chunk.first + segment + shared_.position);
        });
    }

    LPAF_DEVICE void count_segments(const Chunk& chunk, Key rank, int thread) {
        const auto visit = [&](Bits bits, int i) {
            if (Rank<Format>::of(bits) == rank) atomic_add(&shared_.bins[i / kSegment], amount(chunk, i));
        };
        const auto visit_pack = [&](const ScorePack& pack, int first, bool exists) {
            if (!exists) return;
#pragma unroll
            for (int i = 0; i < kPackWidth; ++i) visit(pack.entries[i], first + i);
        };
        for_each_entry(chunk, thread, visit_pack, visit);
    }

    // Unweighted, the entry found is the last kept one; weighted, the first that is not.
    LPAF_DEVICE void set_threshold(Key rank, std::int64_t index) {
        const bool nothing_fits = kWeighted && shared_.needed == selection_.target;
        shared_.value = nothing_fits ? kInfinity : Rank<Format>::value(rank);
        shared_.tie_index = nothing_fits ? 0 : kWeighted ? index : index + 1;
    }

    LPAF_DEVICE void write_result(int thread) {
        for (std::int64_t i = thread; i < selection_.spans; i += kThreads) {
            const std::int64_t span = selection_.first_span + i;
            const Extent extent = arguments_.workspace.extents[span];
            const std::int64_t local = shared_.tie_index - extent.first;
            arguments_.value[span] = shared_.value;
            arguments_.tie_index[span] = local < 0 ? 0 : local < extent.size ? local : extent.size;
        }
    }

    const Arguments& arguments_;
    Shared& shared_;
    const std::int64_t block_;
    const Chunk chunk_;
    Selection& selection_;
};

// The launches of one call. A launcher runs a program: launcher.template run<Program>(blocks, arguments).
template <class Format, bool kWeighted>
class KeepThreshold {
  public:
    // The data of `spans` stays where it is until the launches have run.
    KeepThreshold(std::vector<ScoreSpan> spans, double keep, bool across, int enough_blocks = kEnoughBlocks)
        : spans_(std::move(spans)), keep_(keep), across_(across) {
        for (const ScoreSpan& span : spans_) entries_ += span.size;
        while (chunk_ < kMaxChunk && entries_ / chunk_ > enough_blocks) chunk_ *= 2;
        for (const ScoreSpan& span : spans_) chunks_ += chunks_of(span);
    }

    // Device memory that run() needs, whatever it holds.
    std::size_t workspace_bytes() const { return tie_counts_offset() + chunk_count() * sizeof(TieCounts); }

    // value and tie_index: [spans] in device memory.
    template <class Launcher>
    void run(void* memory, typename Format::Value* value, std::int64_t* tie_index, Launcher& launcher) const {
        auto* bytes = static_cast<std::byte*>(memory);
        const Workspace workspace{
            reinterpret_cast<Selection*>(bytes), reinterpret_cast<Chunk*>(bytes + chunks_offset()),
            reinterpret_cast<Extent*>(bytes + extents_offset()), bytes + tie_counts_offset()};
        prepare(workspace, launcher);
        select(Arguments{workspace, keep_, value, tie_index}, launcher,
               std::make_integer_sequence<int, Rank<Format>::kLevels>{});
    }

  private:
    using Arguments = SelectArguments<typename Format::Value>;
    template <int kLevel>
    using Digit = SelectDigit<Format, kWeighted, kLevel>;
    using LastDigit = Digit<Rank<Format>::kLevels - 1>;
    using TieCounts = typename LastDigit::TieCount[LastDigit::kBins];

    // An empty tensor has one empty chunk, so that every selection has a block.
    std::int64_t chunks_of(const ScoreSpan& span) const {
        return std::max<std::int64_t>(1, (span.size + chunk_ - 1) / chunk_);
    }

    std::size_t chunk_count() const { return static_cast<std::size_t>(chunks_); }
    std::size_t chunks_offset() const { return (across_ ? 1 : spans_.size()) * sizeof(Selection); }
    std::size_t extents_offset() const { return chunks_offset() + chunk_count() * sizeof(Chunk); }
    std::size_t tie_counts_offset() const { return extents_offset() + spans_.size() * sizeof(Extent); }

    template <class Launcher>
    void prepare(const Workspace& workspace, Launcher& launcher) const {
        const auto count = static_cast<std::int64_t>(spans_.size());
        constexpr int kScoreBytes = sizeof(typename Format::Bits);
        Prepare::Arguments table{workspace, kScoreBytes, chunk_, across_, count, chunks_, entries_, 0, {}};
        std::int64_t filled = 0, first = 0, first_chunk = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const ScoreSpan& span = spans_[static_cast<std::size_t>(i)];
            table.sources[filled++] = {span, first, first_chunk, chunks_of(span)};
            if (across_) first += span.size;
            first_chunk += chunks_of(span);
            if (filled < kTableSpans && i + 1 < count) continue;
            launcher.template run<Prepare>(filled, table);
            table.first_span += std::exchange(filled, 0);
        }
    }

    template <class Launcher, int... kLevels>
    void select(const Arguments& arguments, Launcher& launcher,
                std::integer_sequence<int, kLevels...>) const {
        (launcher.template run<Digit<kLevels>>(chunks_, arguments), ...);
    }

    std::vector<ScoreSpan> spans_;
    double keep_;
    bool across_;
    int chunk_ = kMinChunk;
    std::int64_t entries_ = 0;
    std::int64_t chunks_ = 0;
};

}  // namespace lpaf::cuda::radix_select
