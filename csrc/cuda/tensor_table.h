// One launch for many tensors: a table of them, by value in the kernel's parameters, and the share of each in
// the grid. Tiles number the thread blocks of a launch; every tensor has a run of them. No CUDA header, so
// that a host compiler can build it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#if defined(__CUDACC__)
#define LPAF_HOST_DEVICE __host__ __device__
#else
#define LPAF_HOST_DEVICE
#endif

namespace lpaf::cuda {

// Bytes of parameters that a kernel may have (CUDA 12.1 and driver 530 or newer); some are left for scalars
// beside the table.
constexpr std::size_t kParameterBytes = 32764;
constexpr std::size_t kTableBytes = kParameterBytes - 124;

// Entry describes one tensor, or several that belong together. It says how many tiles() it needs and whether
// it can_pack(), that is, may be read and written in packs; `first_tile` and `packed` are set here.
template <class Entry>
struct TensorTable {
    static constexpr std::size_t kCapacity = (kTableBytes - 2 * sizeof(std::uint32_t)) / sizeof(Entry);

    Entry entries[kCapacity];
    std::uint32_t count = 0;
    std::uint32_t tiles = 0;

    // The entry whose tiles include `tile`: the last one that begins at or before it.
    LPAF_HOST_DEVICE std::uint32_t find(std::uint32_t tile) const {
        std::uint32_t low = 0, high = count;
        while (high - low > 1) {
            const std::uint32_t middle = (low + high) / 2;
            if (entries[middle].first_tile <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// Calls launch(table) for tables that hold all entries with a tile, as few as possible; stops at the first
// result that is not Result{}.
template <class Result, class Entry, class Launch>
Result for_each_table(std::span<const Entry> entries, const Launch& launch) {
    TensorTable<Entry> table;
    for (const Entry& entry : entries) {
        if (entry.tiles() == 0) continue;
        if (table.count == TensorTable<Entry>::kCapacity) {
            if (const Result result = launch(table); result != Result{}) return result;
            table.count = table.tiles = 0;
        }
        Entry& added = table.entries[table.count++] = entry;
        added.first_tile = table.tiles;
        added.packed = entry.can_pack();
        table.tiles += static_cast<std::uint32_t>(entry.tiles());
    }
    return table.count == 0 ? Result{} : launch(table);
}

LPAF_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace lpaf::cuda
