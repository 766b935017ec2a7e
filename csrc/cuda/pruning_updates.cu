// lpaf_kernels::accumulate_movement, update_importance, update_sensitivity, zero_pruned and
// sparsity_statistics for CUDA tensors.
#include "cuda/pruning_updates.cuh"

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/binding.h"
#include "tensor_lists.h"

namespace lpaf::cuda::pruning {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <class Function>
void dispatch(const char* op, const TensorList& weights, const Function& function) {
    dispatch_matrices<__half, __nv_bfloat16>(op, weights[0].scalar_type(), function);
}

// Launches Entry's kernel over make_entry(i) for every matrix.
template <class Entry, class MakeEntry, class... Scalars>
void launch_all(const char* op, const TensorList& weights, const MakeEntry& make_entry, Scalars... scalars) {
    std::vector<Entry> entries;
    for (std::size_t i = 0; i < weights.size(); ++i) entries.push_back(make_entry(i));
    const cudaStream_t stream = current_stream(op, weights[0].get_device_index());
    check_launch(op, launch(std::span<const Entry>(entries), stream, scalars...));
}

void accumulate_movement_op(TensorList scores, TensorList weights, TensorList grads, double lr) {
    constexpr const char* op = "accumulate_movement";
    check_weights(op, weights);
    check_state(op, "scores", scores, weights, Shape::kMatrix);
    check_grads(op, grads, weights);
    const DeviceGuard guard(weights[0].get_device_index());
    ContiguousList s(std::move(scores));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto score = s.write<State<Weight>>();
        const auto make_entry = [&](std::size_t i) {
            return MovementEntry<Weight>{weight[i], grad[i], score[i], weights[i].numel()};
        };
        launch_all<MovementEntry<Weight>>(op, weights, make_entry, static_cast<State<Weight>>(lr));
    });
    s.write_back();
}

void update_importance_op(TensorList importance, TensorList weights, TensorList grads, double beta) {
    constexpr const char* op = "update_importance";
    check_weights(op, weights);
    check_state(op, "importance", importance, weights, Shape::kRows);
    check_grads(op, grads, weights);
    const DeviceGuard guard(weights[0].get_device_index());
    ContiguousList s(std::move(importance));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto average = s.write<State<Weight>>();
        const auto make_entry = [&](std::size_t i) {
            return ImportanceEntry<Weight>{weight[i], grad[i], average[i], weights[i].size(0),
                                           weights[i].size(1)};
        };
        launch_all<ImportanceEntry<Weight>>(op, weights, make_entry, beta);
    });
    s.write_back();
}

Tensor update_sensitivity_op(TensorList sensitivity, TensorList uncertainty, TensorList weights,
                             TensorList grads, double beta1, double beta2) {
    constexpr const char* op = "update_sensitivity";
    check_weights(op, weights);
    check_state(op, "sensitivity", sensitivity, weights, Shape::kMatrix);
    check_state(op, "uncertainty", uncertainty, weights, Shape::kMatrix);
    check_grads(op, grads, weights);
    const DeviceGuard guard(weights[0].get_device_index());
    int64_t rows = 0;
    for (const Tensor& weight : weights) rows += weight.size(0);
    const Tensor row_scores = torch::stable::new_empty(sensitivity[0], {rows});
    ContiguousList s(std::move(sensitivity)), u(std::move(uncertainty));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        using Real = State<Weight>;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto average = s.write<Real>(), distance = u.write<Real>();
        auto* scores = static_cast<Real*>(row_scores.mutable_data_ptr());
        const auto make_entry = [&](std::size_t i) {
            const int64_t rows_here = weights[i].size(0);
            const SensitivityEntry<Weight> entry{weight[i], grad[i],   average[i],        distance[i],
                                                 scores,    rows_here, weights[i].size(1)};
            scores += rows_here;
            return entry;
        };
        const Rates<Real> rates{static_cast<Real>(beta1), static_cast<Real>(1 - beta1),
                                static_cast<Real>(beta2), static_cast<Real>(1 - beta2)};
        launch_all<SensitivityEntry<Weight>>(op, weights, make_entry, rates);
    });
    s.write_back();
    u.write_back();
    return row_scores;
}

void zero_pruned_op(TensorList weights, TensorList scores, TensorList values, TensorList tie_indices) {
    constexpr const char* op = "zero_pruned";
    check_weights(op, weights);
    check_state(op, "scores", scores, weights, Shape::kEither);
    check_thresholds(op, values, tie_indices, weights);
    const DeviceGuard guard(weights[0].get_device_index());
    ContiguousList w(weights);
    const ContiguousList s(scores), v(std::move(values)), t(std::move(tie_indices));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.write<Weight>();
        const auto score = s.read<State<Weight>>(), value = v.read<State<Weight>>();
        const auto tie_index = t.read<int64_t>();
        const auto make_entry = [&](std::size_t i) {
            const int64_t columns = scores[i].dim() == 1 ? weights[i].size(1) : 1;
            return ZeroEntry<Weight>{weight[i], score[i], value[i], tie_index[i], scores[i].numel(), columns};
        };
        launch_all<ZeroEntry<Weight>>(op, weights, make_entry);
    });
    w.write_back();
}

// New memory on the device of `like`, set to 0 in the order of the stream.
Tensor zeros(const char* op, const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype,
             std::size_t entry_bytes) {
    const Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
    const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * entry_bytes;
    if (bytes == 0) return tensor;
    check_launch(op, cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes,
                                     current_stream(op, like.get_device_index())));
    return tensor;
}

Tensor sparsity_statistics_op(TensorList weights) {
    constexpr const char* op = "sparsity_statistics";
    check_weights(op, weights);
    const DeviceGuard guard(weights[0].get_device_index());
    int64_t words = 0;  // of the bitmaps of rows and columns
    for (const Tensor& weight : weights) words += ceil_div(weight.size(0), 32) + ceil_div(weight.size(1), 32);
    const auto matrices = static_cast<int64_t>(weights.size());
    const Tensor result = zeros(op, weights[0], {matrices, 3}, ScalarType::Long, sizeof(int64_t));
    const Tensor bitmaps = zeros(op, weights[0], {words}, ScalarType::Int, sizeof(int32_t));
    const ContiguousList w(weights);
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>();
        auto* counts = static_cast<unsigned long long*>(result.mutable_data_ptr());
        auto* bits = static_cast<std::uint32_t*>(bitmaps.mutable_data_ptr());
        const auto make_entry = [&](std::size_t i) {
            const int64_t rows = weights[i].size(0), columns = weights[i].size(1);
            std::uint32_t* const column_bits = bits + ceil_div(rows, 32);
            const StatisticsEntry<Weight> entry{weight[i], counts + 3 * i, bits, column_bits, rows, columns};
            bits = column_bits + ceil_div(columns, 32);
            return entry;
        };
        launch_all<StatisticsEntry<Weight>>(op, weights, make_entry);
    });
    return result;
}

}  // namespace
}  // namespace lpaf::cuda::pruning

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CUDA, m) {
    m.impl("accumulate_movement", TORCH_BOX(&lpaf::cuda::pruning::accumulate_movement_op));
    m.impl("update_importance", TORCH_BOX(&lpaf::cuda::pruning::update_importance_op));
    m.impl("update_sensitivity", TORCH_BOX(&lpaf::cuda::pruning::update_sensitivity_op));
    m.impl("zero_pruned", TORCH_BOX(&lpaf::cuda::pruning::zero_pruned_op));
    m.impl("sparsity_statistics", TORCH_BOX(&lpaf::cuda::pruning::sparsity_statistics_op));
}
