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

// Rows of a block: a pass of them fills the second-level cache, and each weight that is fetched serves many.
constexpr int64_t kBlockRows = 256;

struct FeedForward {
    LowRankSparseLayer first, second;
    const LowRankSparseLayer* gate;  // or null
    Activation activation;
    const Input& x;
    const Ending& ending;

    // Hidden neurons at a time: what one pass of the second layer's projection reads.
    int64_t chunk() const { return std::max<int64_t>(1, lowrank_sparse_kernels().pass_depth(first.out)); }

    // Floats of all intermediates of one row, and that `forward_block` takes to work in.
    int64_t row_room() const {
        const int64_t own = padded(first.columns()) + padded(second.columns()) + padded(chunk());
        return gate == nullptr ? own : own + padded(gate->columns()) + padded(chunk());
    }
    int64_t room(int64_t rows) const {
        return kSumDepth * kSumWidth + rows * row_room() + x.room(rows) + ending.room(rows);
    }
};

// y of the rows [begin, end).
void forward_block(const FeedForward& block, int64_t begin, int64_t end, float* room) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const ElementwiseKernels& single = elementwise_kernels();
    const LowRankSparseLayer &first = block.first, &second = block.second;
    const int64_t size = end - begin, hidden = first.out, chunk = block.chunk();
    float* panel = room;
    room += kSumDepth * kSumWidth;
    const auto take = [&](int64_t columns) {
        const Rows<float> rows = {room, padded(columns)};
        room = rows[size];
        return rows;
    };
    const Rows<float> z1 = take(first.columns()), z2 = take(second.columns()), h = take(chunk);
    Rows<float> z_gate{nullptr, 0}, gate{nullptr, 0};
    if (block.gate != nullptr) {
        z_gate = take(block.gate->columns());
        gate = take(chunk);
    }
    float* y_room = room + block.x.room(size);
    const Rows<const float> x = {block.x.rows(begin, end, room), first.in};
    products.project(first, x, size, 0, first.columns(), z1);
    if (block.gate != nullptr) products.project(*block.gate, x, size, 0, block.gate->columns(), z_gate);
    for (int64_t from = 0; from < std::max<int64_t>(1, hidden); from += chunk) {
        const int64_t width = std::min(chunk, hidden - from);
        const auto make = [&](const LowRankSparseLayer& layer, const Rows<float>& z, const Rows<float>& to) {
            products.expand(layer, {z.data, z.stride}, size, from, from + width, {to.data - from, to.stride},
                            panel);
        };
        make(first, z1, h);
        if (block.gate != nullptr) make(*block.gate, z_gate, gate);
        for (int64_t row = 0; row < size; ++row) {
            if (block.gate != nullptr) {
                single.activate_gate(block.activation, gate[row], h[row], width);
            } else {
                single.activate(block.activation, h[row], width);
            }
        }
        products.project_pass(second, from, {h.data, h.stride}, size, z2);
    }
    products.expand(second, {z2.data, z2.stride}, size, 0, second.out,
                    {block.ending.rows(begin, y_room), second.out}, panel);
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
