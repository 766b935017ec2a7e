// lpaf_kernels::lowrank_ffn_forward for CPU tensors in float32 or bfloat16: a whole feed-forward block, a few
// rows at a time in float32, so that the wide hidden activation is written to and read from the second-level
// cache only.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/block_arguments.h"
#include "cpu/elementwise.h"
#include "cpu/lowrank_arguments.h"
#include "cpu/lowrank_sparse_linear.h"
#include "cpu/parallel.h"
#include "cpu/torch_products.h"

namespace lpaf::cpu {
namespace {

// Rows of a block: whole tiles of both products, and 60 rows of 3072 hidden neurons fill 0.7 MB.
constexpr int64_t kBlockRows = 60;

struct FeedForward {
    LowRankSparseLayer first, second;
    const LowRankSparseLayer* gate;  // or null
    Activation activation;
    const Input& x;
    const Ending& ending;

    // z of one block, of whichever layer has the most columns.
    int64_t z_pitch() const {
        const int64_t columns = std::max(first.columns(), second.columns());
        return padded(gate == nullptr ? columns : std::max(columns, gate->columns()));
    }

    // Floats that `forward_block` takes to work in.
    int64_t room(int64_t rows) const {
        const int64_t hidden = (gate == nullptr ? 1 : 2) * padded(first.out);
        return kSumDepth * kSumWidth + rows * (z_pitch() + hidden) + x.room(rows) + ending.room(rows);
    }
};

// y of the rows [begin, end).
void forward_block(const FeedForward& block, int64_t begin, int64_t end, float* room) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const ElementwiseKernels& single = elementwise_kernels();
    const int64_t size = end - begin, in = block.first.in, hidden = block.first.out, out = block.second.out;
    float* panel = room;
    const Rows<float> z = {panel + kSumDepth * kSumWidth, block.z_pitch()};
    const Rows<float> h = {z[size], padded(hidden)};
    const Rows<float> gate = {h[size], h.stride};
    float* x_room = block.gate == nullptr ? gate.data : gate[size];
    float* y_room = x_room + block.x.room(size);
    const auto apply = [&](const LowRankSparseLayer& layer, Rows<const float> from, Rows<float> to) {
        products.project(layer, from, size, 0, layer.columns(), z);
        products.expand(layer, {z.data, z.stride}, size, 0, layer.out, to, panel);
    };
    const Rows<const float> x = {block.x.rows(begin, end, x_room), in};
    apply(block.first, x, h);
    if (block.gate != nullptr) apply(*block.gate, x, gate);
    for (int64_t row = 0; row < size; ++row) {
        if (block.gate != nullptr) {
            single.activate_gate(block.activation, gate[row], h[row], hidden);
        } else {
            single.activate(block.activation, h[row], hidden);
        }
    }
    apply(block.second, {h.data, h.stride}, {block.ending.rows(begin, y_room), out});
    block.ending.finish(begin, end, y_room);
}

void forward(const FeedForward& block) {
    const int64_t threads = torch::stable::get_num_threads(), rows = block.x.count();
    const int64_t blocks = std::min(rows, ceil_div(ceil_div(rows, kBlockRows), threads) * threads);
    const int64_t most = ceil_div(rows, blocks);
    const int64_t work =
        most * (block.first.in * block.first.columns() + 2 * block.first.out * block.first.rank);
    share_out(blocks, 1, work, [&](int64_t begin, int64_t end) {
        const auto room = scratch(block.room(most));
        for (int64_t i = begin; i < end; ++i) {
            forward_block(block, rows * i / blocks, rows * (i + 1) / blocks, room.get());
        }
    });
}

Activation activation_of(const char* op, const std::string& name) {
    if (name == "none") return Activation::kNone;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    if (name == "silu") return Activation::kSilu;
    if (name == "tanh") return Activation::kTanh;
    invalid(op, ": activation is ", name, ", expected none, gelu, gelu_tanh, relu, silu or tanh");
}

Tensor lowrank_ffn_forward(Tensor x, Tensor down1, Tensor up1, std::optional<Tensor> kept1,
                           std::optional<Tensor> bias1, Tensor down2, Tensor up2, std::optional<Tensor> kept2,
                           std::optional<Tensor> bias2, std::optional<Tensor> down_gate,
                           std::optional<Tensor> up_gate, std::optional<Tensor> bias_gate,
                           std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                           std::optional<Tensor> norm_bias, std::string activation, std::string norm,
                           double epsilon) {
    constexpr const char* op = "lowrank_ffn_forward";
    check_block_dtype(op, x);
    const ScalarType dtype = x.scalar_type();
    const Arguments first = widened_layer(op, dtype, x.size(-1), down1, up1, kept1, bias1);
    const int64_t hidden = first.layer.out;
    const Arguments second = widened_layer(op, dtype, hidden, down2, up2, kept2, bias2);
    std::optional<Arguments> gate;
    if (down_gate.has_value() != up_gate.has_value()) invalid(op, ": down_gate and up_gate go together");
    if (down_gate) {
        gate.emplace(widened_layer(op, dtype, x.size(-1), *down_gate, *up_gate, std::nullopt, bias_gate));
        if (gate->layer.out != hidden) {
            invalid(op, ": up_gate has shape ", shape_of(*up_gate), ", expected ", hidden, " columns");
        }
    }
    const Tensor y = empty(with_last(x, second.layer.out), dtype_of(x));
    const Input input(x);
    const Ending ending(op, y, residual, norm_weight, norm_bias, norm, epsilon);
    const FeedForward block{
        first.layer, second.layer, gate ? &gate->layer : nullptr, activation_of(op, activation),
        input,       ending};
    if (y.numel() > 0) forward(block);
    return y;
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("lowrank_ffn_forward", TORCH_BOX(&lpaf::cpu::lowrank_ffn_forward));
}
