// lpaf_kernels::lowrank_sparse_linear_forward and lowrank_sparse_linear_gradients for CPU tensors.
#include "cpu/lowrank_sparse_linear.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/lowrank_arguments.h"
#include "cpu/parallel.h"
#include "cpu/torch_products.h"

namespace lpaf::cpu {

const LowRankSparseKernels& lowrank_sparse_kernels() {
    static const LowRankSparseKernels& chosen =
#if defined(__x86_64__)
        for_this_processor(kBaselineKernels, kAvx2Kernels, kAvx512Kernels);
#else
        kBaselineKernels;
#endif
    return chosen;
}

namespace {

// Rows per task where tasks share out rows: z stays in the second-level cache, the weights are used often.
constexpr int64_t kRowBlock = 512;
// With fewer rows per thread the tasks share out columns instead, so that each weight is read by one thread.
constexpr int64_t kFewRowsPerThread = 24;
// Columns of a gradient of the weights per task at least: a task reads whole cache lines of every row.
constexpr int64_t kGradientColumns = 32;

bool has_few_rows(int64_t rows) {
    return rows < torch::stable::get_num_threads() * kFewRowsPerThread;
}

// Tasks on blocks of rows, as many blocks as threads or a multiple; one row is `work` multiplications.
template <class Task>
void share_out_rows(int64_t rows, int64_t work, const Task& task) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = ceil_div(ceil_div(rows, kRowBlock), threads) * threads;
    share_out(blocks, 1, rows / blocks * work, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            task(rows * block / blocks, rows * (block + 1) / blocks);
        }
    });
}

// y and, where z.data is not null, z.
void forward(const LowRankSparseLayer& layer, Rows<const float> x, int64_t rows, Rows<float> z, float* y) {
    const LowRankSparseKernels& kernel = lowrank_sparse_kernels();
    const int64_t pitch = padded(layer.columns());
    if (has_few_rows(rows)) {
        std::unique_ptr<float[]> own;
        if (z.data == nullptr) {
            own = scratch(rows * pitch);
            z = {own.get(), pitch};
        }
        share_out(layer.columns(), kDotColumns, rows * layer.in,
                  [&](int64_t begin, int64_t end) { kernel.project(layer, x, rows, begin, end, z); });
        share_out(layer.out, kSumWidth, rows * std::max<int64_t>(1, layer.rank),
                  [&](int64_t begin, int64_t end) {
                      const auto panel = scratch(kSumDepth * kSumWidth);
                      kernel.expand(layer, {z.data, z.stride}, rows, begin, end, {y, layer.out}, panel.get());
                  });
        return;
    }
    const int64_t work = layer.in * layer.columns() + layer.out * layer.rank;
    share_out_rows(rows, work, [&](int64_t begin, int64_t end) {
        const int64_t size = end - begin;
        const auto panel = scratch(kSumDepth * kSumWidth);
        const auto own = scratch(z.data == nullptr ? size * pitch : 0);
        const Rows<float> block =
            z.data == nullptr ? Rows<float>{own.get(), pitch} : Rows<float>{z[begin], z.stride};
        kernel.project(layer, {x[begin], x.stride}, size, 0, layer.columns(), block);
        kernel.expand(layer, {block.data, block.stride}, size, 0, layer.out,
                      {y + begin * layer.out, layer.out}, panel.get());
    });
}

// Where the gradients go; null: not needed.
struct Gradients {
    float* x = nullptr;
    float* down = nullptr;
    float* up = nullptr;
    float* bias = nullptr;
};

// The gradients of forward from grad [rows, out], x [rows, in] and the first `rank` columns of z.
void backward(const LowRankSparseLayer& layer, Rows<const float> grad, Rows<const float> x,
              Rows<const float> z, int64_t rows, const Gradients& to) {
    const LowRankSparseKernels& kernel = lowrank_sparse_kernels();
    const int64_t columns = layer.columns(), pitch = padded(columns);
    const bool through_z = to.x != nullptr || to.down != nullptr;
    const auto own = scratch(through_z ? rows * pitch : 0);
    const Rows<float> d_z = {own.get(), pitch};
    // Each product as the layer that computes it.
    const LowRankSparseLayer project_grad{layer.out, layer.rank, 0, layer.up, nullptr, nullptr, {}};
    const LowRankSparseLayer expand_d_z{0, columns, layer.in, nullptr, layer.down, nullptr, {}};
    const auto gather = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t j = 0; j < layer.kept.size; ++j) d_z[row][layer.rank + j] = grad[row][layer.kept[j]];
        }
    };
    const auto expand = [&](int64_t first, int64_t size, int64_t begin, int64_t end) {
        const auto panel = scratch(kSumDepth * kSumWidth);
        kernel.expand(expand_d_z, {d_z[first], pitch}, size, begin, end, {to.x + first * layer.in, layer.in},
                      panel.get());
    };
    if (through_z && has_few_rows(rows)) {
        gather(0, rows);
        share_out(layer.rank, kDotColumns, rows * layer.out, [&](int64_t begin, int64_t end) {
            kernel.project(project_grad, grad, rows, begin, end, d_z);
        });
        if (to.x != nullptr) {
            share_out(layer.in, kSumWidth, rows * std::max<int64_t>(1, columns),
                      [&](int64_t begin, int64_t end) { expand(0, rows, begin, end); });
        }
    } else if (through_z) {
        share_out_rows(rows, layer.out * layer.rank + layer.in * columns, [&](int64_t begin, int64_t end) {
            gather(begin, end);
            kernel.project(project_grad, {grad[begin], grad.stride}, end - begin, 0, layer.rank,
                           {d_z[begin], pitch});
            if (to.x != nullptr) expand(begin, end - begin, 0, layer.in);
        });
    }
    // One task for columns of d down, d up and d bias: the columns of d down come first.
    const LowRankSparseLayer sum_x{0, rows, layer.in, nullptr, x.data, nullptr, {}};
    const LowRankSparseLayer sum_grad{0, rows, layer.out, nullptr, grad.data, nullptr, {}};
    const int64_t down_units = to.down == nullptr ? 0 : ceil_div(layer.in, kGradientColumns);
    const int64_t up_units =
        to.up == nullptr && to.bias == nullptr ? 0 : ceil_div(layer.out, kGradientColumns);
    share_out(down_units + up_units, 1, kGradientColumns * rows * columns, [&](int64_t begin, int64_t end) {
        const auto panel = scratch(kSumDepth * kSumWidth);
        if (begin < down_units) {
            kernel.expand_transposed(sum_x, {d_z.data, pitch}, columns, begin * kGradientColumns,
                                     std::min(std::min(end, down_units) * kGradientColumns, layer.in),
                                     {to.down, layer.in}, panel.get());
        }
        if (end <= down_units) return;
        const int64_t from = (std::max(begin, down_units) - down_units) * kGradientColumns;
        const int64_t until = std::min((end - down_units) * kGradientColumns, layer.out);
        if (to.up != nullptr) {
            kernel.expand_transposed(sum_grad, z, layer.rank, from, until, {to.up, layer.out}, panel.get());
        }
        if (to.bias != nullptr) kernel.sum_columns(grad, rows, from, until, to.bias);
    });
}

// In 16 bits: torch's products, whose kernels use the processor's 16-bit instructions, and the kept columns
// here, which torch would add through an index as large as they are.

// y[:, kept] += z[:, rank:], or, where gather is set, z[:, rank:] = y[:, kept].
template <class Entry>
void move_kept(const LowRankSparseLayer& layer, int64_t rows, Entry* z, Entry* y, bool gather) {
    if (layer.kept.size == 0) return;
    share_out(rows, 1, 8 * layer.kept.size, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            Entry* z_row = z + row * layer.columns() + layer.rank;
            Entry* y_row = y + row * layer.out;
            for (int64_t j = 0; j < layer.kept.size; ++j) {
                Entry& at = y_row[layer.kept[j]];
                if (gather) {
                    z_row[j] = at;
                } else {
                    at = static_cast<Entry>(static_cast<float>(at) + static_cast<float>(z_row[j]));
                }
            }
        }
    });
}

void move_kept_16_bit(const Arguments& arguments, const Tensor& z, const Tensor& y, bool gather) {
    const auto move = [&]<class Entry>(Entry) {
        move_kept(arguments.layer, arguments.rows, static_cast<Entry*>(z.mutable_data_ptr()),
                  static_cast<Entry*>(y.mutable_data_ptr()), gather);
    };
    if (arguments.dtype == ScalarType::BFloat16) {
        move(torch::headeronly::BFloat16{});
    } else {
        move(torch::headeronly::Half{});
    }
}

void forward_16_bit(const Arguments& arguments, const Tensor& z, const Tensor& y) {
    const auto& [in, rank, out, down, up, bias, kept] = arguments.layer;
    const Tensor rows = matrix(arguments.x, arguments.rows, in, in);
    const Tensor low = matrix(z, arguments.rows, rank, arguments.layer.columns());
    const Tensor result = matrix(y, arguments.rows, out, out);
    multiply(z, rows, transposed(arguments.down));
    if (arguments.bias) {
        multiply_add(result, *arguments.bias, low, arguments.up);
    } else {
        multiply(result, low, arguments.up);
    }
    move_kept_16_bit(arguments, z, y, false);
}

// grad [rows, out] contiguous; the pointers are null where a gradient is not needed.
void gradients_16_bit(const Arguments& arguments, const Tensor& grad, const Tensor& z, const Tensor* d_x,
                      const Tensor* d_down, const Tensor* d_up) {
    const LowRankSparseLayer& layer = arguments.layer;
    const int64_t rows = arguments.rows, columns = layer.columns();
    if (d_x != nullptr || d_down != nullptr) {
        const Tensor d_z = empty({rows, columns}, dtype_of(grad));
        multiply(matrix(d_z, rows, layer.rank, columns), grad, transposed(arguments.up));
        move_kept_16_bit(arguments, d_z, grad, true);
        if (d_x != nullptr) multiply(matrix(*d_x, rows, layer.in, layer.in), d_z, arguments.down);
        if (d_down != nullptr) {
            multiply(*d_down, transposed(d_z), matrix(arguments.x, rows, layer.in, layer.in));
        }
    }
    if (d_up != nullptr) multiply(*d_up, transposed(matrix(z, rows, layer.rank, z.stride(0))), grad);
}

std::tuple<Tensor, Tensor> lowrank_sparse_linear_forward(Tensor x, Tensor down, Tensor up,
                                                         std::optional<Tensor> kept,
                                                         std::optional<Tensor> bias, bool keep_z) {
    const Arguments arguments("lowrank_sparse_linear_forward", x, down, up, kept, bias);
    const LowRankSparseLayer& layer = arguments.layer;
    const int64_t rows = arguments.rows;
    const int32_t dtype = dtype_of(arguments.x);
    const Tensor y = empty(arguments.with_last(layer.out), dtype);
    if (arguments.dtype != ScalarType::Float) {
        const Tensor z = empty({rows, layer.columns()}, dtype);
        if (rows > 0) forward_16_bit(arguments, z, y);
        return {y, keep_z ? z : empty({0}, dtype)};
    }
    const Tensor z = keep_z ? empty({rows, layer.columns()}, dtype) : empty({0}, dtype);
    Rows<float> z_rows{keep_z ? static_cast<float*>(z.mutable_data_ptr()) : nullptr, layer.columns()};
    if (rows > 0)
        forward(layer, {floats(arguments.x), layer.in}, rows, z_rows,
                static_cast<float*>(y.mutable_data_ptr()));
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_sparse_linear_gradients(
    Tensor grad, Tensor x, Tensor down, Tensor up, std::optional<Tensor> kept, Tensor z, bool needs_x,
    bool needs_down, bool needs_up, bool needs_bias) {
    constexpr const char* op = "lowrank_sparse_linear_gradients";
    const Arguments arguments(op, x, down, up, kept, std::nullopt);
    const LowRankSparseLayer& layer = arguments.layer;
    const int64_t rows = arguments.rows;
    check_dtype(op, "grad", grad, arguments.dtype);
    check_matrix(op, "grad", grad);
    if (grad.size(0) != rows || grad.size(1) != layer.out) {
        invalid(op, ": grad has shape ", shape_of(grad), ", expected [", rows, ", ", layer.out, "]");
    }
    grad = as_contiguous(grad);
    if (needs_up) {
        check_dtype(op, "z", z, arguments.dtype);
        check_matrix(op, "z", z);
        if (z.size(0) != rows || z.size(1) < layer.rank || (z.numel() > 0 && z.stride(1) != 1)) {
            invalid(op, ": z has shape ", shape_of(z), ", expected [", rows, ", at least ", layer.rank,
                    "] with contiguous rows");
        }
    }
    const int32_t dtype = dtype_of(arguments.x);
    const auto empty_for = [dtype](bool needed, const std::vector<int64_t>& shape) {
        return empty(needed ? shape : std::vector<int64_t>{0}, dtype);
    };
    const Tensor d_x = empty_for(needs_x, arguments.with_last(layer.in));
    const Tensor d_down = empty_for(needs_down, {layer.columns(), layer.in});
    const Tensor d_up = empty_for(needs_up, {layer.rank, layer.out});
    if (arguments.dtype != ScalarType::Float) {
        gradients_16_bit(arguments, grad, z, needs_x ? &d_x : nullptr, needs_down ? &d_down : nullptr,
                         needs_up ? &d_up : nullptr);
        const int64_t over_rows = 0;
        return {d_x, d_down, d_up,
                needs_bias ? torch::stable::sum(grad, {{&over_rows, 1}}) : empty({0}, dtype)};
    }
    const Tensor d_bias = empty_for(needs_bias, {layer.out});
    const auto to = [](bool needed, const Tensor& gradient) {
        return needed && gradient.numel() > 0 ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
    };
    backward(layer, {floats(grad), layer.out}, {floats(arguments.x), layer.in},
             {needs_up ? floats(z) : nullptr, needs_up ? z.stride(0) : 0}, rows,
             {to(needs_x, d_x), to(needs_down, d_down), to(needs_up, d_up), to(needs_bias, d_bias)});
    return {d_x, d_down, d_up, d_bias};
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("lowrank_sparse_linear_forward", TORCH_BOX(&lpaf::cpu::lowrank_sparse_linear_forward));
    m.impl("lowrank_sparse_linear_gradients", TORCH_BOX(&lpaf::cpu::lowrank_sparse_linear_gradients));
}
