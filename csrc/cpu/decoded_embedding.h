// Rows of an embedding that is stored as latent rows and a decoder, on the CPU in float32. No torch.
//
// A block of latent rows is gathered, goes through the decoder's layers by the products of
// lowrank_sparse_linear, and is rescaled, all while it is in the second-level cache: neither the gathered
// rows nor a hidden layer reach memory. Ids that occur several times, as padding and frequent words do, can
// be decoded once each and copied from that cache to where they stand.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/lowrank_sparse_linear.h"

namespace lpaf::cpu {

struct DecoderLayer {
    std::int64_t in, out;
    const float* weight;  // [in, out]
    const float* bias;    // [out] or null
};

struct DecodedEmbedding {
    static constexpr int kMostLayers = 3;

    const float* latent;  // [vocab, in of the first layer]
    const float* norms;   // [vocab], the lengths that decoded rows are given, or null
    int count;            // of layers; one alone is linear, more have activations
    DecoderLayer layers[kMostLayers];

    std::int64_t out() const { return layers[count - 1].out; }
    // Multiplications per row.
    std::int64_t work() const {
        std::int64_t sum = 0;
        for (int i = 0; i < count; ++i) sum += layers[i].in * layers[i].out;
        return sum;
    }
};

// The distinct values of ids in the order of their first occurrence, and which of them each id is.
struct DistinctIds {
    std::vector<std::int64_t> ids;
    std::vector<std::int64_t> index;

    std::int64_t size() const { return static_cast<std::int64_t>(ids.size()); }
};

template <class Id>
DistinctIds distinct(const Id* ids, std::int64_t size) {
    constexpr std::uint64_t kSpread = 0x9e3779b97f4a7c15;  // Fibonacci hashing: 2^64 over the golden ratio
    const int bits = std::bit_width(static_cast<std::uint64_t>(size)) + 1;  // at least half of it stays free
    std::vector<std::int32_t> table(std::size_t{1} << bits, -1);
    DistinctIds found;
    found.index.resize(static_cast<std::size_t>(size));
    for (std::int64_t at = 0; at < size; ++at) {
        const std::int64_t id = ids[at];
        std::uint64_t slot = static_cast<std::uint64_t>(id) * kSpread >> (64 - bits);
        while (table[slot] >= 0 && found.ids[static_cast<std::size_t>(table[slot])] != id) {
            slot = (slot + 1) & (table.size() - 1);
        }
        if (table[slot] < 0) {
            table[slot] = static_cast<std::int32_t>(found.size());
            found.ids.push_back(id);
        }
        found.index[static_cast<std::size_t>(at)] = table[slot];
    }
    return found;
}

// Where each distinct id stands: those of number i are at[begins[i]:begins[i + 1]].
struct Places {
    std::vector<std::int64_t> at, begins;
};

inline Places places(const DistinctIds& distinct) {
    Places found{std::vector<std::int64_t>(distinct.index.size()),
                 std::vector<std::int64_t>(distinct.ids.size() + 1)};
    for (const std::int64_t i : distinct.index) ++found.begins[static_cast<std::size_t>(i)];
    std::int64_t end = 0;
    for (std::int64_t& begin : found.begins) begin = end += begin;
    // Counts became ends, and with each place that is written they become begins.
    for (std::size_t at = distinct.index.size(); at-- > 0;) {
        const std::int64_t place = --found.begins[static_cast<std::size_t>(distinct.index[at])];
        found.at[static_cast<std::size_t>(place)] = static_cast<std::int64_t>(at);
    }
    return found;
}

// y[:rows] of `rows` ids, each below the vocabulary's size. room[i] takes the rows that layer i reads.
template <class Id>
void decode_rows(const DecodedEmbedding& embedding, const Id* ids, std::int64_t rows, const Rows<float>* room,
                 float* panel, const LowRankSparseKernels& products, const ElementwiseKernels& single,
                 Rows<float> y) {
    const bool deep = embedding.count > 1;
    const std::int64_t width = embedding.layers[0].in, out = embedding.out();
    for (std::int64_t row = 0; row < rows; ++row) {
        __builtin_memcpy(room[0][row], embedding.latent + static_cast<std::int64_t>(ids[row]) * width,
                         static_cast<std::size_t>(width) * sizeof(float));
        if (deep) single.activate(Activation::kLeakyRelu, room[0][row], width);
    }
    for (int i = 0; i < embedding.count; ++i) {
        const DecoderLayer& layer = embedding.layers[i];
        const bool last = i + 1 == embedding.count;
        const Rows<float> to = last ? y : room[i + 1];
        products.expand({0, layer.in, layer.out, nullptr, layer.weight, layer.bias, {}},
                        {room[i].data, room[i].stride}, rows, 0, layer.out, to, panel);
        for (std::int64_t row = 0; deep && row < rows; ++row) {
            single.activate(last ? Activation::kTanh : Activation::kLeakyRelu, to[row], layer.out);
        }
    }
    if (embedding.norms == nullptr) return;
    for (std::int64_t row = 0; row < rows; ++row) {
        // A row of zeros has no direction and stays; NaN stays NaN.
        const float length = single.length(y[row], out);
        const float norm = embedding.norms[ids[row]];
        single.multiply(length == 0.0f ? norm : norm / length, y[row], out);
    }
}

}  // namespace lpaf::cpu
