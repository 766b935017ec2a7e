// lpaf_kernels::lowrank_ffn_forward for CPU tensors in float32: a whole feed-forward block, a few rows at a
// time, so that the wide hidden activation is written to and read from the second-level cache only.
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
    const Ending& ending;

    // z of one block, of whichever layer has the most columns.
    int64_t z_pitch() const {
        const int64_t columns = std::max(first.columns(), second.columns());
        return padded(gate == nullptr ? columns : std::max(columns, gate->columns()));
    }
};

// y of the rows [begin, end), with room to work in.
void forward_block(const FeedForward& block, const float* x, int64_t begin, int64_t end, float* room,
                   float* y) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const ElementwiseKernels& single = elementwise_kernels();
    const int64_t size = end - begin, in = block.first.in, hidden = block.first.out, out = block.second.out;
    float* panel = room;
    const Rows<float> z = {panel + kSumDepth * kSumWidth, block.z_pitch()};
    const Rows<float> h = {z.data + size * z.stride, padded(hidden)};
    const Rows<float> gate = {h.data + size * h.stride, h.stride};
    const auto apply = [&](const LowRankSparseLayer& layer, Rows<const float> from, Rows<float> to) {
        products.project(layer, from, size, 0, layer.columns(), z);
        products.expand(layer, {z.data, z.stride}, size, 0, layer.out, to, panel);
    };
    apply(block.first, {x + begin * in, in}, h);
    if (block.gate != nullptr) apply(*block.gate, {x + begin * in, in}, gate);
    for (int64_t row = 0; row < size; ++row) {
        if (block.gate != nullptr) {
            single.activate_gate(block.activation, gate[row], h[row], hidden);
        } else {
            single.activate(block.activation, h[row], hidden);
        }
    }
    apply(block.second, {h.data, h.stride}, {y + begin * out, out});
    for (int64_t row = begin; row < end; ++row) block.ending.finish(row, y + row * out, out);
}

void forward(const FeedForward& block, const float* x, int64_t rows, float* y) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = std::min(rows, ceil_div(ceil_div(rows, kBlockRows), threads) * threads);
    const int64_t most = ceil_div(rows, blocks);
    const int64_t hidden_rows = (block.gate == nullptr ? 1 : 2) * most;
    const int64_t room =
        kSumDepth * kSumWidth + most * block.z_pitch() + hidden_rows * padded(block.first.out);
    const int64_t work =
        most * (block.first.in * block.first.columns() + 2 * block.first.out * block.first.rank);
    share_out(blocks, 1, work, [&](int64_t begin, int64_t end) {
        const auto own = scratch(room);
        for (int64_t i = begin; i < end; ++i) {
            forward_block(block, x, rows * i / blocks, rows * (i + 1) / blocks, own.get(), y);
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
    const Arguments first(op, x, down1, up1, kept1, bias1);
    check_dtype(op, "x", x, ScalarType::Float);
    const int64_t hidden = first.layer.out;
    // The second layer's arguments are checked against an input of the hidden size that is never made.
    const Arguments second(op, matrix(up1, 0, hidden, hidden), down2, up2, kept2, bias2);
    std::optional<Arguments> gate;
    if (down_gate.has_value() != up_gate.has_value()) invalid(op, ": down_gate and up_gate go together");
    if (down_gate) {
        gate.emplace(op, x, *down_gate, *up_gate, std::nullopt, bias_gate);
        if (gate->layer.out != hidden) {
            invalid(op, ": up_gate has shape ", shape_of(*up_gate), ", expected ", hidden, " columns");
        }
    }
    const int64_t out = second.layer.out;
    const Tensor y = empty(first.with_last(out), dtype_of(first.x));
    const Ending ending(op, y, residual, norm_weight, norm_bias, norm, epsilon);
    const FeedForward block{first.layer, second.layer, gate ? &gate->layer : nullptr,
                            activation_of(op, activation), ending};
    if (first.rows > 0 && out > 0) {
        forward(block, floats(first.x), first.rows, static_cast<float*>(y.mutable_data_ptr()));
    }
    return y;
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("lowrank_ffn_forward", TORCH_BOX(&lpaf::cpu::lowrank_ffn_forward));
}
