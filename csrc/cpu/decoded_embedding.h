// Rows of an embedding that is stored as latent rows and a decoder, on the CPU in float32. No torch.
//
// A block of latent rows is gathered, goes through the decoder's layers by the products of
// lowrank_sparse_linear, and is rescaled, all while it is in the second-level cache: neither the gathered
// rows nor a hidden layer reach memory.
#pragma once

#include <cstdint>

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

// y [rows, out] of `rows` ids, each below the vocabulary's size. room[i] takes the rows that layer i reads.
template <class Id>
void decode_rows(const DecodedEmbedding& embedding, const Id* ids, std::int64_t rows, const Rows<float>* room,
                 float* panel, const LowRankSparseKernels& products, const ElementwiseKernels& single,
                 float* y) {
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
        const Rows<float> to = last ? Rows<float>{y, out} : room[i + 1];
        products.expand({0, layer.in, layer.out, nullptr, layer.weight, layer.bias, {}},
                        {room[i].data, room[i].stride}, rows, 0, layer.out, to, panel);
        for (std::int64_t row = 0; deep && row < rows; ++row) {
            single.activate(last ? Activation::kTanh : Activation::kLeakyRelu, to[row], layer.out);
        }
    }
    if (embedding.norms == nullptr) return;
    for (std::int64_t row = 0; row < rows; ++row) {
        // A row of zeros has no direction and stays; NaN stays NaN.
        const float length = single.length(y + row * out, out);
        const float norm = embedding.norms[ids[row]];
        single.multiply(length == 0.0f ? norm : norm / length, y + row * out, out);
    }
}

}  // namespace lpaf::cpu
