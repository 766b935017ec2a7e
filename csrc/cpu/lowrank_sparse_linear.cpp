// lpaf_kernels::lowrank_sparse_linear_forward for CPU tensors.
#include "cpu/lowrank_sparse_linear.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_checks.h"

namespace lpaf::cpu {
namespace {

// Multiplications per parallel task at least: below this, starting threads costs more than the work.
constexpr int64_t kGrain = 1 << 17;
// Rows per task where tasks share out rows: z stays in the second-level cache, the weights are used often.
constexpr int64_t kRowBlock = 512;
// With fewer rows per thread the tasks share out columns instead, so that each weight is read by one thread.
constexpr int64_t kFewRowsPerThread = 24;

const LowRankSparseKernels& kernels() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return kAvx512Kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2Kernels;
#endif
    return kBaselineKernels;
}

// Uninitialised floats to work in.
std::unique_ptr<float[]> scratch(int64_t size) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(size)]);
}

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Tasks on ranges of [0, size) that begin at multiples of `unit`; one entry of the range is `work` multiplications.
template <class Task>
void share_out(int64_t size, int64_t unit, int64_t work, const Task& task) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, unit * work));
    torch::stable::parallel_for(0, ceil_div(size, unit), grain, [&](int64_t begin, int64_t end) {
        task(begin * unit, std::min(end * unit, size));
    });
}

// y and, where z.data is not null, z.
void forward(const LowRankSparseLayer& layer, Rows<const float> x, int64_t rows, Rows<float> z, float* y) {
    const LowRankSparseKernels& kernel = kernels();
    const int64_t threads = torch::stable::get_num_threads();
    // An odd number of cache lines: rows at a multiple of a page would evict each other.
    const int64_t padded = ceil_div(layer.columns(), 32) * 32 + 16;
    if (rows < threads * kFewRowsPerThread) {
        std::unique_ptr<float[]> own;
        if (z.data == nullptr) {
            own = scratch(rows * padded);
            z = {own.get(), padded};
        }
        share_out(layer.columns(), kDotColumns, rows * layer.in, [&](int64_t begin, int64_t end) {
            kernel.project(layer, x, rows, begin, end, z);
        });
        share_out(layer.out, kSumWidth, rows * std::max<int64_t>(1, layer.rank), [&](int64_t begin, int64_t end) {
            const auto panel = scratch(kSumDepth * kSumWidth);
            kernel.expand(layer, {z.data, z.stride}, rows, begin, end, {y, layer.out}, panel.get());
        });
        return;
    }
    const int64_t blocks = ceil_div(ceil_div(rows, kRowBlock), threads) * threads;
    const int64_t work = rows / blocks * (layer.in * layer.columns() + layer.out * layer.rank);
    share_out(blocks, 1, work, [&](int64_t begin, int64_t end) {
        const auto panel = scratch(kSumDepth * kSumWidth);
        const auto own = scratch(z.data == nullptr ? ceil_div(rows, blocks) * padded : 0);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = rows * block / blocks, size = rows * (block + 1) / blocks - first;
            const Rows<float> z_block = z.data == nullptr ? Rows<float>{own.get(), padded} : Rows<float>{z[first], z.stride};
            kernel.project(layer, {x[first], x.stride}, size, 0, layer.columns(), z_block);
            kernel.expand(layer, {z_block.data, z_block.stride}, size, 0, layer.out, {y + first * layer.out, layer.out},
                          panel.get());
        }
    });
}

// torch::stable::contiguous and new_empty look their operators up by name, which costs a small layer its lead.
Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_float32(const std::vector<int64_t>& shape) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t dim = shape.size(); dim-- > 1;) {
        strides[dim - 1] = strides[dim] * std::max<int64_t>(1, shape[dim]);
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                 aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

const float* floats(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
}

void check_matrix(const char* op, const char* name, const Tensor& tensor) {
    if (tensor.dim() != 2) invalid(op, ": ", name, " has shape ", shape_of(tensor), ", expected two dimensions");
}

void check_float32(const char* op, const char* name, const Tensor& tensor) {
    if (tensor.scalar_type() != ScalarType::Float || !tensor.is_cpu()) {
        invalid(op, ": ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                ", expected float32 on the CPU");
    }
}

KeptColumns kept_columns(const char* op, const Tensor& kept, int64_t out) {
    KeptColumns columns;
    columns.size = kept.numel();
    if (kept.dim() != 1 || !kept.is_cpu()) {
        invalid(op, ": kept has shape ", shape_of(kept), ", expected one dimension on the CPU");
    }
    if (kept.scalar_type() == ScalarType::Int) {
        columns.as_int32 = static_cast<const int32_t*>(kept.const_data_ptr());
    } else if (kept.scalar_type() == ScalarType::Long) {
        columns.as_int64 = static_cast<const int64_t*>(kept.const_data_ptr());
    } else {
        invalid(op, ": kept has dtype ", torch::headeronly::toString(kept.scalar_type()),
                ", expected int32 or int64");
    }
    int64_t previous = -1;
    for (int64_t j = 0; j < columns.size; ++j) {
        if (columns[j] <= previous || columns[j] >= out) {
            invalid(op, ": kept[", j, "] is ", columns[j], " after ", previous,
                    ", expected sorted unique positions in [0, ", out, ")");
        }
        previous = columns[j];
    }
    return columns;
}

std::tuple<Tensor, Tensor> lowrank_sparse_linear_forward(Tensor x, Tensor down, Tensor up,
                                                         std::optional<Tensor> kept, std::optional<Tensor> bias,
                                                         bool keep_z) {
    constexpr const char* op = "lowrank_sparse_linear_forward";
    check_float32(op, "x", x);
    check_float32(op, "down", down);
    check_float32(op, "up", up);
    check_matrix(op, "down", down);
    check_matrix(op, "up", up);
    x = as_contiguous(x);
    down = as_contiguous(down);
    up = as_contiguous(up);
    LowRankSparseLayer layer{down.size(1), up.size(0), up.size(1), floats(down), floats(up), nullptr, {}};
    if (kept) {
        kept = as_contiguous(*kept);
        layer.kept = kept_columns(op, *kept, layer.out);
    }
    if (bias) {
        check_float32(op, "bias", *bias);
        if (bias->dim() != 1 || bias->size(0) != layer.out) {
            invalid(op, ": bias has shape ", shape_of(*bias), ", expected [", layer.out, "]");
        }
        bias = as_contiguous(*bias);
        layer.bias = floats(*bias);
    }
    if (x.dim() == 0 || x.size(-1) != layer.in) {
        invalid(op, ": x has shape ", shape_of(x), ", expected last dimension ", layer.in);
    }
    if (down.size(0) != layer.columns()) {
        invalid(op, ": down has shape ", shape_of(down), ", expected ", layer.columns(), " rows");
    }
    int64_t rows = 1;
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
        rows *= x.size(dim);
        shape.push_back(x.size(dim));
    }
    shape.push_back(layer.out);
    const Tensor y = empty_float32(shape);
    const Tensor z = keep_z ? empty_float32({rows, layer.columns()}) : empty_float32({0});
    Rows<float> z_rows{keep_z ? static_cast<float*>(z.mutable_data_ptr()) : nullptr, layer.columns()};
    if (rows > 0) forward(layer, {floats(x), layer.in}, rows, z_rows, static_cast<float*>(y.mutable_data_ptr()));
    return {y, z};
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("lowrank_sparse_linear_forward", TORCH_BOX(&lpaf::cpu::lowrank_sparse_linear_forward));
}
