// Walks the launches over a list of drawn tensors as their thread blocks would: exits with 0 if every tile of
// every tensor is found once, and no table is launched that a fuller one could have spared.
#include "cuda/tensor_table.h"

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace {

struct Entry {
    std::size_t id;
    std::int64_t size;
    std::uint32_t first_tile = 0;
    bool packed = false;
    char padding[40] = {};  // as large as the entries of kernels are

    std::int64_t tiles() const { return lpaf::cuda::ceil_div(size, 4); }
    bool can_pack() const { return size % 2 == 0; }
};
using Table = lpaf::cuda::TensorTable<Entry>;
static_assert(sizeof(Table) <= lpaf::cuda::kTableBytes);

bool covers_every_tile(std::size_t tensors, std::mt19937_64& random) {
    std::vector<Entry> entries;
    std::vector<std::vector<int>> found;
    std::size_t with_tiles = 0, launches = 0;
    bool right = true;
    for (std::size_t id = 0; id < tensors; ++id) {
        entries.push_back({id, static_cast<std::int64_t>(random() % 30)});
        found.emplace_back(static_cast<std::size_t>(entries.back().tiles()));
        with_tiles += entries.back().tiles() != 0;
    }
    const int error =
        lpaf::cuda::for_each_table<int>(std::span<const Entry>(entries), [&](const Table& table) {
            ++launches;
            for (std::uint32_t tile = 0; tile < table.tiles; ++tile) {
                const Entry& entry = table.entries[table.find(tile)];
                ++found[entry.id].at(tile - entry.first_tile);
                right = right && entry.packed == entry.can_pack();
            }
            return 0;
        });
    for (const auto& tiles : found) {
        for (const int times : tiles) right = right && times == 1;
    }
    const auto fewest = lpaf::cuda::ceil_div(static_cast<std::int64_t>(with_tiles), Table::kCapacity);
    return right && error == 0 && static_cast<std::int64_t>(launches) == fewest;
}

// A launch that fails is the last one.
bool stops_at_an_error() {
    const std::vector<Entry> entries(3 * Table::kCapacity, Entry{0, 1});
    int launches = 0;
    const int error = lpaf::cuda::for_each_table<int>(std::span<const Entry>(entries),
                                                      [&](const Table&) { return ++launches == 2 ? 7 : 0; });
    return error == 7 && launches == 2;
}

}  // namespace

int main() {
    std::mt19937_64 random(0);
    for (const std::size_t tensors : {std::size_t{0}, std::size_t{1}, std::size_t{72}, Table::kCapacity,
                                      Table::kCapacity + 1, 3 * Table::kCapacity}) {
        if (!covers_every_tile(tensors, random)) return 1;
    }
    return stops_at_an_error() ? 0 : 2;
}
