// lpaf_kernels::decoded_embedding_forward for CPU tensors.
#include "cpu/decoded_embedding.h"

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/block_arguments.h"
#include "cpu/lowrank_arguments.h"
#include "cpu/parallel.h"
#include "cpu/torch_products.h"

namespace lpaf::cpu {
namespace {

// Rows that are decoded together: what lies between the layers stays in the second-level cache, and a panel
// of a weight serves all of them.
constexpr int64_t kBlockRows = 256;
// Distinct ids per id at most for which copying every row costs less than decoding repeats.
constexpr double kDistinctShare = 0.85;

template <class Id>
void check_ids(const char* op, const Id* ids, int64_t size, int64_t vocabulary) {
    for (int64_t at = 0; at < size; ++at) {
        if (ids[at] < 0 || ids[at] >= vocabulary) {
            invalid(op, ": ids[", at, "] is ", ids[at], ", expected 0 to ", vocabulary - 1);
        }
    }
}

// Decodes `rows` ids by blocks that the threads share. Row i goes to y[i] or, by way of a buffer, to the
// places of number i.
template <class Id>
void decode(const DecodedEmbedding& embedding, const Id* ids, int64_t rows, const Places* places, float* y) {
    const int64_t out = embedding.out();
    // As many blocks as threads, or a multiple.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = std::min(rows, ceil_div(ceil_div(rows, kBlockRows), threads) * threads);
    const int64_t most = ceil_div(rows, blocks);
    share_out(blocks, 1, most * embedding.work(), [&](int64_t begin, int64_t end) {
        int64_t floats = kSumDepth * kSumWidth + (places == nullptr ? 0 : most * padded(out));
        for (int i = 0; i < embedding.count; ++i) floats += most * padded(embedding.layers[i].in);
        const auto own = scratch(floats);
        float* next = own.get() + kSumDepth * kSumWidth;
        Rows<float> room[DecodedEmbedding::kMostLayers] = {};
        for (int i = 0; i < embedding.count; ++i) {
            room[i] = {next, padded(embedding.layers[i].in)};
            next = room[i][most];
        }
        for (int64_t block = begin; block < end; ++block) {
            const int64_t from = rows * block / blocks, until = rows * (block + 1) / blocks;
            const Rows<float> to =
                places == nullptr ? Rows<float>{y + from * out, out} : Rows<float>{next, padded(out)};
            decode_rows(embedding, ids + from, until - from, room, own.get(), lowrank_sparse_kernels(),
                        elementwise_kernels(), to);
            if (places == nullptr) continue;
            for (int64_t row = from; row < until; ++row) {
                const auto i = static_cast<size_t>(row);
                for (int64_t at = places->begins[i]; at < places->begins[i + 1]; ++at) {
                    std::copy_n(to[row - from], out, y + places->at[static_cast<size_t>(at)] * out);
                }
            }
        }
    });
}

template <class Id>
void forward(const char* op, const DecodedEmbedding& embedding, const Id* ids, int64_t size,
             int64_t vocabulary, float* y) {
    check_ids(op, ids, size, vocabulary);
    const DistinctIds found = distinct(ids, size);
    if (static_cast<double>(found.size()) > kDistinctShare * static_cast<double>(size)) {
        decode(embedding, ids, size, nullptr, y);
    } else {
        const Places places_of = places(found);
        decode(embedding, found.ids.data(), found.size(), &places_of, y);
    }
}

Tensor float_vector(const char* op, const char* name, const Tensor& tensor, int64_t size) {
    check_dtype(op, name, tensor, ScalarType::Float);
    if (tensor.dim() != 1 || tensor.size(0) != size) {
        invalid(op, ": ", name, " has shape ", shape_of(tensor), ", expected [", size, "]");
    }
    return as_contiguous(tensor);
}

Tensor decoded_embedding_forward(Tensor ids, Tensor latent, Tensor weight1, std::optional<Tensor> bias1,
                                 std::optional<Tensor> weight2, std::optional<Tensor> bias2,
                                 std::optional<Tensor> weight3, std::optional<Tensor> bias3,
                                 std::optional<Tensor> norms) {
    constexpr const char* op = "decoded_embedding_forward";
    check_dtype(op, "latent", latent, ScalarType::Float);
    check_matrix(op, "latent", latent);
    if (latent.size(1) == 0) invalid(op, ": latent has shape ", shape_of(latent), ", expected columns");
    latent = as_contiguous(latent);
    const int64_t vocabulary = latent.size(0);
    DecodedEmbedding embedding{floats(latent), nullptr, 0, {}};
    int64_t width = latent.size(1);
    std::vector<Tensor> held;  // contiguous copies live as long as the pointers to them
    const auto add_layer = [&](const char* name, const Tensor& given, const char* bias_name,
                               const std::optional<Tensor>& bias) {
        check_dtype(op, name, given, ScalarType::Float);
        check_matrix(op, name, given);
        if (given.size(0) != width || given.size(1) == 0) {
            invalid(op, ": ", name, " has shape ", shape_of(given), ", expected ", width,
                    " rows and columns");
        }
        held.push_back(as_contiguous(given));
        DecoderLayer& layer = embedding.layers[embedding.count++];
        layer = {width, given.size(1), floats(held.back()), nullptr};
        width = layer.out;
        if (!bias) return;
        held.push_back(float_vector(op, bias_name, *bias, width));
        layer.bias = floats(held.back());
    };
    add_layer("weight1", weight1, "bias1", bias1);
    if (weight2) add_layer("weight2", *weight2, "bias2", bias2);
    if (weight3) add_layer("weight3", *weight3, "bias3", bias3);
    if (norms) {
        held.push_back(float_vector(op, "norms", *norms, vocabulary));
        embedding.norms = floats(held.back());
    }
    if (!ids.is_cpu()) invalid(op, ": ids must be on the CPU like latent");
    ids = as_contiguous(ids);
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim < ids.dim(); ++dim) shape.push_back(ids.size(dim));
    shape.push_back(width);
    const Tensor y = empty(shape, dtype_of(latent));
    if (ids.numel() == 0) return y;
    auto* to = static_cast<float*>(y.mutable_data_ptr());
    if (ids.scalar_type() == ScalarType::Long) {
        forward(op, embedding, static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel(), vocabulary,
                to);
    } else if (ids.scalar_type() == ScalarType::Int) {
        forward(op, embedding, static_cast<const int32_t*>(ids.const_data_ptr()), ids.numel(), vocabulary,
                to);
    } else {
        invalid(op, ": ids has dtype ", torch::headeronly::toString(ids.scalar_type()),
                ", expected int32 or int64");
    }
    return y;
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("decoded_embedding_forward", TORCH_BOX(&lpaf::cpu::decoded_embedding_forward));
}
