// lpaf_kernels::keep_threshold for CPU tensors.
#include "cpu/keep_threshold.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <string_view>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "tensor_checks.h"

namespace lpaf::cpu {
namespace {

constexpr const char* kOp = "keep_threshold";

// With as many matrices per thread, none waits long for the last one.
constexpr int kMatricesPerThread = 4;

void check_arguments(const std::vector<Tensor>& scores, double keep,
                     const std::optional<std::vector<Tensor>>& weights) {
    if (scores.empty()) invalid(kOp, ": scores is an empty list, expected at least one tensor");
    if (!(keep >= 0.0 && keep <= 1.0)) invalid(kOp, ": keep is ", keep, ", expected a share in [0, 1]");
    if (weights && weights->size() != scores.size()) {
        invalid(kOp, ": weights has ", weights->size(), " tensors, expected one per tensor of scores, ",
                scores.size());
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
        if (!scores[i].is_cpu()) invalid(kOp, ": scores[", i, "] is not on the CPU like scores[0]");
        if (scores[i].scalar_type() != scores[0].scalar_type()) {
            invalid(kOp, ": scores[", i, "] has dtype ", torch::headeronly::toString(scores[i].scalar_type()),
                    ", expected that of scores[0], ", torch::headeronly::toString(scores[0].scalar_type()));
        }
        if (!weights) continue;
        const Tensor& weight = (*weights)[i];
        if (!weight.is_cpu() || weight.scalar_type() != ScalarType::Long ||
            weight.numel() != scores[i].numel()) {
            invalid(kOp, ": weights[", i, "] has shape ", shape_of(weight), " and dtype ",
                    torch::headeronly::toString(weight.scalar_type()),
                    ", expected one int64 count on the CPU per entry of scores[", i, "], ",
                    shape_of(scores[i]));
        }
    }
}

template <class Score>
std::tuple<Tensor, Tensor> select(const std::vector<Tensor>& scores, double keep, bool across,
                                  const std::optional<std::vector<Tensor>>& weights) {
    using Value = typename ScoreKey<Score>::Value;
    constexpr ScalarType value_type = sizeof(Value) == 8 ? ScalarType::Double : ScalarType::Float;
    std::vector<Tensor> contiguous;  // keeps copies of strided tensors alive
    std::vector<ScoreSpan<Score>> spans;
    const auto data_of = [&contiguous](const Tensor& tensor) {
        contiguous.push_back(torch::stable::contiguous(tensor));
        return contiguous.back().const_data_ptr();
    };
    for (std::size_t i = 0; i < scores.size(); ++i) {
        const auto* data = static_cast<const Score*>(data_of(scores[i]));
        const auto* counts = weights ? static_cast<const int64_t*>(data_of((*weights)[i])) : nullptr;
        spans.push_back({data, counts, scores[i].numel()});
    }

    const auto count = static_cast<int64_t>(spans.size());
    Tensor value = torch::stable::new_empty(scores[0], {count}, value_type);
    Tensor tie_index = torch::stable::new_empty(scores[0], {count}, ScalarType::Long);
    auto* values = static_cast<Value*>(value.mutable_data_ptr());
    auto* tie_indices = static_cast<int64_t*>(tie_index.mutable_data_ptr());

    const auto threads = static_cast<int>(torch::stable::get_num_threads());
    const auto share_out = [](int64_t tasks, const auto& task) {
        torch::stable::parallel_for(0, tasks, 1, [&task](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) task(i);
        });
    };
    const auto alone = [](int64_t tasks, const auto& task) {
        for (int64_t i = 0; i < tasks; ++i) task(i);
    };
    const auto select_spans = [&](std::size_t first, std::size_t size, int with_threads,
                                  const auto& parallel_for) {
        try {
            return keep_threshold(std::span<const ScoreSpan<Score>>(spans).subspan(first, size),
                                  weights.has_value(), keep, with_threads, parallel_for);
        } catch (const InvalidEntryError& error) {
            const bool in_scores = std::string_view(error.what()) == "NaN";
            invalid(kOp, in_scores ? ": scores[" : ": weights[", first + error.span, "] holds ", error.what(),
                    in_scores ? ", expected numbers" : ", expected positive counts");
        }
    };
    if (across) {
        const KeepThreshold<Value> threshold = select_spans(0, spans.size(), threads, share_out);
        int64_t offset = 0;
        for (std::size_t i = 0; i < spans.size(); offset += spans[i++].size) {
            values[i] = threshold.value;
            tie_indices[i] = std::clamp<int64_t>(threshold.tie_index - offset, 0, spans[i].size);
        }
        return {value, tie_index};
    }
    const auto store = [&](int64_t i, const KeepThreshold<Value>& threshold) {
        values[i] = threshold.value;
        tie_indices[i] = threshold.tie_index;
    };
    int64_t total = 0, largest = 0;
    for (const ScoreSpan<Score>& span : spans) {
        total += span.size;
        largest = std::max(largest, span.size);
    }
    if (count >= kMatricesPerThread * threads && largest <= total / threads) {
        // A thread that is done takes the next matrix, and nothing has to be awaited within a matrix. Errors
        // wait until all threads are back.
        std::vector<std::exception_ptr> errors(spans.size());
        std::atomic<int64_t> next{0};
        share_out(threads, [&](int64_t) {
            for (int64_t i = next++; i < count; i = next++) {
                const auto position = static_cast<std::size_t>(i);
                try {
                    store(i, select_spans(position, 1, 1, alone));
                } catch (...) {
                    errors[position] = std::current_exception();
                }
            }
        });
        for (const std::exception_ptr& error : errors) {
            if (error) std::rethrow_exception(error);
        }
    } else {
        for (int64_t i = 0; i < count; ++i) {
            store(i, select_spans(static_cast<std::size_t>(i), 1, threads, share_out));
        }
    }
    return {value, tie_index};
}

std::tuple<Tensor, Tensor> keep_threshold_op(std::vector<Tensor> scores, double keep, bool across,
                                             std::optional<std::vector<Tensor>> weights) {
    check_arguments(scores, keep, weights);
    switch (scores[0].scalar_type()) {
        case ScalarType::Float: return select<float>(scores, keep, across, weights);
        case ScalarType::Double: return select<double>(scores, keep, across, weights);
        case ScalarType::Half: return select<Half>(scores, keep, across, weights);
        case ScalarType::BFloat16: return select<BFloat16>(scores, keep, across, weights);
        default:
            invalid(kOp, ": scores has dtype ", torch::headeronly::toString(scores[0].scalar_type()),
                    ", expected float32, float64, float16 or bfloat16");
    }
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("keep_threshold", TORCH_BOX(&lpaf::cpu::keep_threshold_op));
}
