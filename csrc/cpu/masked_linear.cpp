// lpaf_kernels::masked_linear_weight, _grads, _pack, _packed_weight and _packed_grads for CPU tensors.
#include "cpu/masked_linear.h"

#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dispatch.h"
#include "dtype_dispatch.h"
#include "tensor_checks.h"

namespace lpaf::cpu {
namespace {

// Entries per parallel task at least: below this, starting threads costs more than the work.
constexpr int64_t kGrain = 1 << 15;

template <class Function>
auto dispatch(const char* op, const char* name, ScalarType dtype, const Function& function) {
    return dispatch_dtype<float, Half, BFloat16>(op, name, dtype, function);
}

// The functions below exist once per instruction set and combination of types.
template <class Weight, class Score, class Out>
LPAF_MULTIVERSION void weight_range(const Weight* weight, const Score* scores, Wide<Score> value,
                                    int64_t tie_index, int64_t size, Out* out) {
    masked_weight(weight, scores, value, tie_index, size, out);
}

template <class Grad, class Weight, class Score>
LPAF_MULTIVERSION void grads_range(const Grad* grad, const Weight* weight, const Score* scores,
                                   Wide<Score> value, int64_t tie_index, int64_t size, Weight* d_weight,
                                   Score* d_scores) {
    masked_grads(grad, weight, scores, value, tie_index, size, d_weight, d_scores);
}

template <class Score>
LPAF_MULTIVERSION void pack_range(const Score* scores, Wide<Score> value, int64_t tie_index, int64_t size,
                                  uint8_t* bits) {
    pack_mask(scores, value, tie_index, size, bits);
}

struct Mask {
    Tensor value, tie_index;
};

void check_selection(const char* op, const Tensor& scores, const Mask& mask) {
    const bool is_double = scores.scalar_type() == ScalarType::Double;
    check_one_element(op, "value", mask.value, is_double ? ScalarType::Double : ScalarType::Float);
    check_one_element(op, "tie_index", mask.tie_index, ScalarType::Long);
    if (!scores.is_cpu() || !mask.value.is_cpu() || !mask.tie_index.is_cpu()) {
        invalid(op, ": scores, value and tie_index must all be on the CPU");
    }
}

void check_mask(const char* op, const Tensor& weight, const Tensor& scores, const Mask& mask) {
    check_same_shape(op, "scores", scores, "weight", weight);
    if (!weight.is_cpu()) invalid(op, ": weight must be on the CPU like scores");
    check_selection(op, scores, mask);
}

template <class Weight, class Score, class Out>
void run_weight(const Tensor& weight, const Tensor& scores, const Mask& mask, const Tensor& out) {
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    const auto* score = static_cast<const Score*>(scores.const_data_ptr());
    auto* result = static_cast<Out*>(out.mutable_data_ptr());
    const auto value = *static_cast<const Wide<Score>*>(mask.value.const_data_ptr());
    const auto tie_index = *static_cast<const int64_t*>(mask.tie_index.const_data_ptr());
    torch::stable::parallel_for(0, weight.numel(), kGrain, [=](int64_t begin, int64_t end) {
        weight_range(weights + begin, score + begin, value, tie_index - begin, end - begin, result + begin);
    });
}

Tensor masked_linear_weight(Tensor weight, Tensor scores, Tensor value, Tensor tie_index, ScalarType dtype) {
    constexpr const char* op = "masked_linear_weight";
    const Mask mask{value, tie_index};
    check_mask(op, weight, scores, mask);
    const Tensor w = torch::stable::contiguous(weight), s = torch::stable::contiguous(scores);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    if (w.scalar_type() == ScalarType::Double && s.scalar_type() == ScalarType::Double &&
        dtype == ScalarType::Double) {
        run_weight<double, double, double>(w, s, mask, out);
        return out;
    }
    dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch(op, "scores", s.scalar_type(), [&](auto score_tag) {
            dispatch(op, "the result", dtype, [&](auto out_tag) {
                run_weight<typename decltype(weight_tag)::type, typename decltype(score_tag)::type,
                           typename decltype(out_tag)::type>(w, s, mask, out);
            });
        });
    });
    return out;
}

template <class Grad, class Weight, class Score>
void run_grads(const Tensor& grad_weight, const Tensor& weight, const Tensor& scores, const Mask& mask,
               const Tensor& d_weight, const Tensor& d_scores) {
    const auto* grad = static_cast<const Grad*>(grad_weight.const_data_ptr());
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    const auto* score = static_cast<const Score*>(scores.const_data_ptr());
    auto* to_weight = static_cast<Weight*>(d_weight.mutable_data_ptr());
    auto* to_scores = static_cast<Score*>(d_scores.mutable_data_ptr());
    const auto value = *static_cast<const Wide<Score>*>(mask.value.const_data_ptr());
    const auto tie_index = *static_cast<const int64_t*>(mask.tie_index.const_data_ptr());
    torch::stable::parallel_for(0, weight.numel(), kGrain, [=](int64_t begin, int64_t end) {
        grads_range(grad + begin, weights + begin, score + begin, value, tie_index - begin, end - begin,
                    to_weight + begin, to_scores + begin);
    });
}

std::tuple<Tensor, Tensor> masked_linear_grads(Tensor grad_weight, Tensor weight, Tensor scores, Tensor value,
                                               Tensor tie_index) {
    constexpr const char* op = "masked_linear_grads";
    const Mask mask{value, tie_index};
    check_mask(op, weight, scores, mask);
    check_same_shape(op, "grad_weight", grad_weight, "weight", weight);
    if (!grad_weight.is_cpu()) invalid(op, ": grad_weight must be on the CPU like weight");
    const Tensor g = torch::stable::contiguous(grad_weight), w = torch::stable::contiguous(weight),
                 s = torch::stable::contiguous(scores);
    const Tensor d_weight = torch::stable::new_empty(w, w.sizes());
    const Tensor d_scores = torch::stable::new_empty(s, s.sizes());
    if (g.scalar_type() == ScalarType::Double && w.scalar_type() == ScalarType::Double &&
        s.scalar_type() == ScalarType::Double) {
        run_grads<double, double, double>(g, w, s, mask, d_weight, d_scores);
        return {d_weight, d_scores};
    }
    dispatch(op, "grad_weight", g.scalar_type(), [&](auto grad_tag) {
        dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
            dispatch(op, "scores", s.scalar_type(), [&](auto score_tag) {
                run_grads<typename decltype(grad_tag)::type, typename decltype(weight_tag)::type,
                          typename decltype(score_tag)::type>(g, w, s, mask, d_weight, d_scores);
            });
        });
    });
    return {d_weight, d_scores};
}

// A mask of bits over [rows, cols] entries, each for a block of `height` x `run` weights. Work is shared out
// in tasks of up to `part` entries of one row of entries; the sizes alone decide on it, and no sum crosses a
// task.
struct Blocks {
    static constexpr int64_t kMostEntries = 4096;

    int64_t rows, cols, height, run;
    const uint8_t* bits;

    Blocks(const Tensor& weight, const Tensor& mask, int64_t mask_rows, int64_t mask_cols)
        : rows(mask_rows),
          cols(mask_cols),
          height(weight.size(0) / std::max<int64_t>(mask_rows, 1)),
          run(weight.size(1) / std::max<int64_t>(mask_cols, 1)),
          bits(static_cast<const uint8_t*>(mask.const_data_ptr())) {
        if (height == 1 && run == 1) {  // a single row: where the weight's rows end does not matter
            cols *= rows;
            rows = std::min<int64_t>(rows, 1);
        }
    }

    // A multiple of 8, so that tasks begin at whole bytes where rows do.
    int64_t part() const {
        const int64_t entries = kGrain / std::max<int64_t>(height * run, 1);
        return std::clamp<int64_t>(entries / 8 * 8, 64, kMostEntries);
    }

    // Calls function(kept, first weight, size, entry) with the flags of `size` entries from `entry` on.
    template <class Function>
    void for_each_part(const Function& function) const {
        const int64_t most = part(), parts = (cols + most - 1) / most;
        const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(most * height * run, 1), 1);
        torch::stable::parallel_for(0, rows * parts, grain, [&](int64_t begin, int64_t end) {
            uint8_t kept[kMostEntries];
            for (int64_t task = begin; task < end; ++task) {
                const int64_t row = task / parts, first = task % parts * most;
                const int64_t size = std::min(most, cols - first);
                unpack_mask(bits, row * cols + first, size, kept);
                function(kept, (row * height * cols + first) * run, size, row * cols + first);
            }
        });
    }
};

template <class Weight, class Out>
LPAF_MULTIVERSION void weight_part(const Weight* weight, const uint8_t* kept, int64_t size,
                                   const Blocks& blocks, Out* out) {
    for (int64_t i = 0; i < blocks.height; ++i) {
        const int64_t row = i * blocks.cols * blocks.run;
        masked_runs(weight + row, kept, size, blocks.run, out + row);
    }
}

template <class Grad, class Weight>
LPAF_MULTIVERSION void grads_part(const Grad* grad, const Weight* weight, const uint8_t* kept, int64_t size,
                                  const Blocks& blocks, Weight* d_weight, Wide<Weight>* sums) {
    for (int64_t i = 0; i < blocks.height; ++i) {
        const int64_t row = i * blocks.cols * blocks.run;
        masked_grad_runs(grad + row, weight + row, kept, size, blocks.run, d_weight + row, sums);
    }
}

void check_bits(const char* op, const Tensor& weight, const Tensor& bits, int64_t rows, int64_t cols) {
    if (weight.dim() != 2 || !weight.is_cpu()) {
        invalid(op, ": weight has shape ", shape_of(weight), ", expected two dimensions on the CPU");
    }
    const auto divides = [](int64_t parts, int64_t size) {
        return parts == size || (parts > 0 && parts < size && size % parts == 0);
    };
    if (!divides(rows, weight.size(0)) || !divides(cols, weight.size(1))) {
        invalid(op, ": rows and cols are ", rows, " and ", cols,
                ", expected divisors of the shape of weight, ", shape_of(weight));
    }
    if (bits.scalar_type() != ScalarType::Byte || bits.dim() != 1 || bits.size(0) != (rows * cols + 7) / 8 ||
        !bits.is_cpu()) {
        invalid(op, ": bits has shape ", shape_of(bits), " and dtype ",
                torch::headeronly::toString(bits.scalar_type()), ", expected ", (rows * cols + 7) / 8,
                " bytes on the CPU");
    }
}

template <class Score>
void run_pack(const Tensor& scores, const Mask& mask, const Tensor& bits) {
    const auto* score = static_cast<const Score*>(scores.const_data_ptr());
    auto* result = static_cast<uint8_t*>(bits.mutable_data_ptr());
    const auto value = *static_cast<const Wide<Score>*>(mask.value.const_data_ptr());
    const auto tie_index = *static_cast<const int64_t*>(mask.tie_index.const_data_ptr());
    const int64_t size = scores.numel();
    torch::stable::parallel_for(0, bits.numel(), kGrain / 8, [=](int64_t begin, int64_t end) {
        const int64_t first = begin * 8, last = std::min(end * 8, size);
        pack_range(score + first, value, tie_index - first, last - first, result + begin);
    });
}

Tensor masked_linear_pack(Tensor scores, Tensor value, Tensor tie_index) {
    constexpr const char* op = "masked_linear_pack";
    const Mask mask{value, tie_index};
    check_selection(op, scores, mask);
    const Tensor s = torch::stable::contiguous(scores);
    const Tensor bits = torch::stable::new_empty(s, {(s.numel() + 7) / 8}, ScalarType::Byte);
    if (s.scalar_type() == ScalarType::Double) {
        run_pack<double>(s, mask, bits);
        return bits;
    }
    dispatch(op, "scores", s.scalar_type(),
             [&](auto score_tag) { run_pack<typename decltype(score_tag)::type>(s, mask, bits); });
    return bits;
}

template <class Weight, class Out>
void run_packed_weight(const Tensor& weight, const Blocks& blocks, const Tensor& out) {
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    auto* result = static_cast<Out*>(out.mutable_data_ptr());
    blocks.for_each_part([&](const uint8_t* kept, int64_t at, int64_t size, int64_t) {
        weight_part(weights + at, kept, size, blocks, result + at);
    });
}

Tensor masked_linear_packed_weight(Tensor weight, Tensor bits, int64_t rows, int64_t cols, ScalarType dtype) {
    constexpr const char* op = "masked_linear_packed_weight";
    check_bits(op, weight, bits, rows, cols);
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bits);
    const Tensor out = torch::stable::new_empty(w, w.sizes(), dtype);
    const Blocks blocks(w, b, rows, cols);
    if (w.scalar_type() == ScalarType::Double && dtype == ScalarType::Double) {
        run_packed_weight<double, double>(w, blocks, out);
        return out;
    }
    dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
        dispatch(op, "the result", dtype, [&](auto out_tag) {
            run_packed_weight<typename decltype(weight_tag)::type, typename decltype(out_tag)::type>(
                w, blocks, out);
        });
    });
    return out;
}

template <class Grad, class Weight, class Score>
void run_packed_grads(const Tensor& grad_weight, const Tensor& weight, const Blocks& blocks,
                      const Tensor& d_weight, const Tensor& d_scores) {
    const auto* grad = static_cast<const Grad*>(grad_weight.const_data_ptr());
    const auto* weights = static_cast<const Weight*>(weight.const_data_ptr());
    auto* to_weight = static_cast<Weight*>(d_weight.mutable_data_ptr());
    auto* to_scores = static_cast<Score*>(d_scores.mutable_data_ptr());
    blocks.for_each_part([&](const uint8_t* kept, int64_t at, int64_t size, int64_t entry) {
        Wide<Weight> sums[Blocks::kMostEntries];
        std::fill_n(sums, size, Wide<Weight>{0});
        grads_part(grad + at, weights + at, kept, size, blocks, to_weight + at, sums);
        for (int64_t i = 0; i < size; ++i) to_scores[entry + i] = narrow<Score>(sums[i]);
    });
}

std::tuple<Tensor, Tensor> masked_linear_packed_grads(Tensor grad_weight, Tensor weight, Tensor bits,
                                                      int64_t rows, int64_t cols, ScalarType scores_dtype) {
    constexpr const char* op = "masked_linear_packed_grads";
    check_bits(op, weight, bits, rows, cols);
    check_same_shape(op, "grad_weight", grad_weight, "weight", weight);
    if (!grad_weight.is_cpu()) invalid(op, ": grad_weight must be on the CPU like weight");
    const Tensor g = torch::stable::contiguous(grad_weight), w = torch::stable::contiguous(weight),
                 b = torch::stable::contiguous(bits);
    const Tensor d_weight = torch::stable::new_empty(w, w.sizes());
    const Tensor d_scores = torch::stable::new_empty(w, {rows, cols}, scores_dtype);
    const Blocks blocks(w, b, rows, cols);
    if (g.scalar_type() == ScalarType::Double && w.scalar_type() == ScalarType::Double &&
        scores_dtype == ScalarType::Double) {
        run_packed_grads<double, double, double>(g, w, blocks, d_weight, d_scores);
        return {d_weight, d_scores};
    }
    dispatch(op, "grad_weight", g.scalar_type(), [&](auto grad_tag) {
        dispatch(op, "weight", w.scalar_type(), [&](auto weight_tag) {
            dispatch(op, "scores", scores_dtype, [&](auto score_tag) {
                run_packed_grads<typename decltype(grad_tag)::type, typename decltype(weight_tag)::type,
                                 typename decltype(score_tag)::type>(g, w, blocks, d_weight, d_scores);
            });
        });
    });
    return {d_weight, d_scores};
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("masked_linear_weight", TORCH_BOX(&lpaf::cpu::masked_linear_weight));
    m.impl("masked_linear_grads", TORCH_BOX(&lpaf::cpu::masked_linear_grads));
    m.impl("masked_linear_pack", TORCH_BOX(&lpaf::cpu::masked_linear_pack));
    m.impl("masked_linear_packed_weight", TORCH_BOX(&lpaf::cpu::masked_linear_packed_weight));
    m.impl("masked_linear_packed_grads", TORCH_BOX(&lpaf::cpu::masked_linear_packed_grads));
}
