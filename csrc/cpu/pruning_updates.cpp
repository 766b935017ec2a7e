// lpaf_kernels::accumulate_movement, update_importance, update_sensitivity, zero_pruned and
// sparsity_statistics for CPU tensors.
#include "cpu/pruning_updates.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dispatch.h"
#include "tensor_lists.h"

namespace lpaf::cpu {
namespace {

// The functions below exist once per instruction set and type.
template <class Weight>
LPAF_MULTIVERSION void movement_piece(const Weight* weights, const Weight* grads, Wide<Weight> rate,
                                      int64_t size, Wide<Weight>* scores) {
    accumulate_movement(weights, grads, rate, size, scores);
}

template <class Weight>
LPAF_MULTIVERSION void importance_piece(const Weight* weights, const Weight* grads, double beta, int64_t rows,
                                        int64_t columns, Wide<Weight>* importance) {
    update_importance(weights, grads, beta, rows, columns, importance);
}

template <class Weight>
LPAF_MULTIVERSION void sensitivity_piece(const Weight* weights, const Weight* grads,
                                         Rates<Wide<Weight>> rates, int64_t rows, int64_t columns,
                                         Wide<Weight>* sensitivity, Wide<Weight>* uncertainty,
                                         Wide<Weight>* scores) {
    update_sensitivity(weights, grads, rates, rows, columns, sensitivity, uncertainty, scores);
}

template <class Weight>
LPAF_MULTIVERSION void zero_piece(const Wide<Weight>* scores, Wide<Weight> value, int64_t tie_index,
                                  int64_t rows, int64_t columns, Weight* weights) {
    zero_pruned(scores, value, tie_index, rows, columns, weights);
}

template <class Weight>
LPAF_MULTIVERSION Counts count_piece(const Weight* weights, int64_t rows, int64_t columns,
                                     uint8_t* column_used) {
    return count_nonzero(weights, rows, columns, column_used);
}

template <class Function>
void dispatch(const char* op, const TensorList& weights, const Function& function) {
    dispatch_matrices<Half, BFloat16>(op, weights[0].scalar_type(), function);
}

std::vector<MatrixShape> shapes_of(const TensorList& weights) {
    std::vector<MatrixShape> shapes;
    for (const Tensor& weight : weights) shapes.push_back({weight.size(0), weight.size(1)});
    return shapes;
}

// Calls task(index, piece) for all pieces, on torch's threads.
template <class Task>
void for_each_piece(const std::vector<RowPiece>& pieces, const Task& task) {
    torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
            task(i, pieces[i]);
    });
}

void accumulate_movement_op(TensorList scores, TensorList weights, TensorList grads, double lr) {
    constexpr const char* op = "accumulate_movement";
    check_weights(op, weights);
    check_state(op, "scores", scores, weights, Shape::kMatrix);
    check_grads(op, grads, weights);
    std::vector<MatrixShape> shapes;  // without rows: every entry is one
    for (const Tensor& weight : weights) shapes.push_back({weight.numel(), 1});
    ContiguousList s(std::move(scores));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto score = s.write<Wide<Weight>>();
        for_each_piece(cut_into_pieces(shapes), [&](std::size_t, const RowPiece& piece) {
            const int64_t begin = piece.first_row;
            movement_piece(weight[piece.matrix] + begin, grad[piece.matrix] + begin,
                           static_cast<Wide<Weight>>(lr), piece.rows, score[piece.matrix] + begin);
        });
    });
    s.write_back();
}

void update_importance_op(TensorList importance, TensorList weights, TensorList grads, double beta) {
    constexpr const char* op = "update_importance";
    check_weights(op, weights);
    check_state(op, "importance", importance, weights, Shape::kRows);
    check_grads(op, grads, weights);
    const std::vector<MatrixShape> shapes = shapes_of(weights);
    ContiguousList s(std::move(importance));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto average = s.write<Wide<Weight>>();
        for_each_piece(cut_into_pieces(shapes), [&](std::size_t, const RowPiece& piece) {
            const int64_t columns = shapes[piece.matrix].columns, begin = piece.first_row * columns;
            importance_piece(weight[piece.matrix] + begin, grad[piece.matrix] + begin, beta, piece.rows,
                             columns, average[piece.matrix] + piece.first_row);
        });
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
    const std::vector<MatrixShape> shapes = shapes_of(weights);
    std::vector<int64_t> first_row;  // of each matrix among all of them
    int64_t rows = 0;
    for (const MatrixShape& shape : shapes) {
        first_row.push_back(rows);
        rows += shape.rows;
    }
    const Tensor row_scores = torch::stable::new_empty(sensitivity[0], {rows});
    ContiguousList s(std::move(sensitivity)), u(std::move(uncertainty));
    const ContiguousList w(weights), g(std::move(grads));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>(), grad = g.read<Weight>();
        const auto average = s.write<Wide<Weight>>(), distance = u.write<Wide<Weight>>();
        auto* scores = static_cast<Wide<Weight>*>(row_scores.mutable_data_ptr());
        const Rates<Wide<Weight>> rates(beta1, beta2);
        for_each_piece(cut_into_pieces(shapes), [&](std::size_t, const RowPiece& piece) {
            const int64_t columns = shapes[piece.matrix].columns, begin = piece.first_row * columns;
            sensitivity_piece(weight[piece.matrix] + begin, grad[piece.matrix] + begin, rates, piece.rows,
                              columns, average[piece.matrix] + begin, distance[piece.matrix] + begin,
                              scores + first_row[piece.matrix] + piece.first_row);
        });
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
    std::vector<MatrixShape> shapes;  // a row has one score
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const bool by_row = scores[i].dim() == 1;
        shapes.push_back({scores[i].numel(), by_row ? weights[i].size(1) : 1});
    }
    ContiguousList w(weights);
    const ContiguousList s(std::move(scores)), values_list(std::move(values)), ties(std::move(tie_indices));
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.write<Weight>();
        const auto score = s.read<Wide<Weight>>(), value = values_list.read<Wide<Weight>>();
        const auto tie_index = ties.read<int64_t>();
        for_each_piece(cut_into_pieces(shapes), [&](std::size_t, const RowPiece& piece) {
            const int64_t columns = shapes[piece.matrix].columns, row = piece.first_row;
            zero_piece(score[piece.matrix] + row, *value[piece.matrix], *tie_index[piece.matrix] - row,
                       piece.rows, columns, weight[piece.matrix] + row * columns);
        });
    });
    w.write_back();
}

// Rows per piece at least where columns are counted: every piece has a flag for each of its columns.
constexpr int64_t kCountedRows = 64;

Tensor sparsity_statistics_op(TensorList weights) {
    constexpr const char* op = "sparsity_statistics";
    check_weights(op, weights);
    const std::vector<MatrixShape> shapes = shapes_of(weights);
    const std::vector<RowPiece> pieces = cut_into_pieces(shapes, kCountedRows);
    std::vector<Counts> counts(pieces.size());
    std::vector<std::vector<uint8_t>> columns_used(pieces.size());
    const ContiguousList w(weights);
    dispatch(op, weights, [&](auto tag) {
        using Weight = typename decltype(tag)::type;
        const auto weight = w.read<Weight>();
        for_each_piece(pieces, [&](std::size_t i, const RowPiece& piece) {
            const int64_t columns = shapes[piece.matrix].columns;
            columns_used[i].resize(static_cast<std::size_t>(columns));
            counts[i] = count_piece(weight[piece.matrix] + piece.first_row * columns, piece.rows, columns,
                                    columns_used[i].data());
        });
    });

    const auto matrices = static_cast<int64_t>(weights.size());
    const Tensor result = torch::stable::new_empty(weights[0], {matrices, 3}, ScalarType::Long);
    auto* of_matrix = static_cast<int64_t*>(result.mutable_data_ptr());
    std::vector<uint8_t> used;
    for (std::size_t matrix = 0, i = 0; matrix < weights.size(); ++matrix, of_matrix += 3) {
        Counts total;
        used.assign(static_cast<std::size_t>(shapes[matrix].columns), 0);
        for (; i < pieces.size() && pieces[i].matrix == matrix; ++i) {
            total.nonzero += counts[i].nonzero;
            total.rows += counts[i].rows;
            for (std::size_t column = 0; column < used.size(); ++column)
                used[column] |= columns_used[i][column];
        }
        of_matrix[0] = total.nonzero;
        of_matrix[1] = total.rows;
        of_matrix[2] = std::count(used.begin(), used.end(), uint8_t{1});
    }
    return result;
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("accumulate_movement", TORCH_BOX(&lpaf::cpu::accumulate_movement_op));
    m.impl("update_importance", TORCH_BOX(&lpaf::cpu::update_importance_op));
    m.impl("update_sensitivity", TORCH_BOX(&lpaf::cpu::update_sensitivity_op));
    m.impl("zero_pruned", TORCH_BOX(&lpaf::cpu::zero_pruned_op));
    m.impl("sparsity_statistics", TORCH_BOX(&lpaf::cpu::sparsity_statistics_op));
}
