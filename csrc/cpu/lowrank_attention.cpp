// lpaf_kernels::lowrank_attention_forward for CPU tensors in float32 or bfloat16: a whole self-attention
// block, in float32 inside. The narrow z of Q, K and V is all that is kept of the projections; Q, K, V and
// the scores of one head of one sequence are made from it, used and overwritten, so that they never leave the
// second-level cache.
//
// Three steps, each shared out among the threads: z (by tokens), the heads (by sequence and key head) and O
// with residual and norm (by tokens).
#include <algorithm>
#include <memory>
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

// Tokens per task of the steps that go by tokens: each weight that is fetched serves many.
constexpr int64_t kBlockRows = 128;
// Scores at a time, which stay in the second-level cache beside K and V.
constexpr int64_t kScores = 1 << 16;
constexpr int64_t kTileRows = 12, kMostQueries = 10 * kTileRows;

// Queries at a time. It follows from the sequence's own length, and with it, where attention is causal, how
// many keys a sum has.
int64_t query_block(int64_t length) {
    return std::clamp(kScores / length / kTileRows * kTileRows, kTileRows, kMostQueries);
}

struct Sequence {
    int64_t begin, length;  // in tokens
};

// attn_mask [batch, heads, length, length], most of its strides 0.
class Mask {
  public:
    Mask(const char* op, const Tensor& mask, const std::vector<int64_t>& expected)
        : data_(mask.const_data_ptr()) {
        is_bool_ = mask.scalar_type() == ScalarType::Bool;
        if (!is_bool_) check_dtype(op, "attn_mask", mask, ScalarType::Float);
        bool same = mask.dim() == 4 && mask.is_cpu();
        for (int64_t dim = 0; same && dim < 4; ++dim) same = mask.size(dim) == expected[dim];
        if (!same) {
            invalid(op, ": attn_mask has shape ", shape_of(mask), ", expected [", expected[0], ", ",
                    expected[1], ", ", expected[2], ", ", expected[3], "] on the CPU");
        }
        for (int64_t dim = 0; dim < 4; ++dim) strides_[dim] = mask.stride(dim);
    }

    // What is added to the first `size` scores of one query; in `room` unless it lies in memory as it is.
    const float* row(int64_t batch, int64_t head, int64_t query, int64_t size, float* room) const {
        const int64_t from = batch * strides_[0] + head * strides_[1] + query * strides_[2];
        if (is_bool_) {
            const bool* allowed = static_cast<const bool*>(data_) + from;
            for (int64_t key = 0; key < size; ++key) {
                room[key] = allowed[key * strides_[3]] ? 0.0f : -__builtin_inff();
            }
            return room;
        }
        const float* values = static_cast<const float*>(data_) + from;
        if (strides_[3] == 1) return values;
        for (int64_t key = 0; key < size; ++key) room[key] = values[key * strides_[3]];
        return room;
    }

    bool same_for_all_queries() const { return strides_[2] == 0; }

  private:
    const void* data_;
    bool is_bool_;
    int64_t strides_[4];
};

// cos and sin of every token's angles, [tokens or length, head_dim] each.
struct Rotary {
    const float* cos = nullptr;
    const float* sin = nullptr;
    bool by_token = false;  // else every sequence has the same

    explicit operator bool() const { return cos != nullptr; }

    void turn(const Sequence& sequence, int64_t position, float* row, int64_t head_dim) const {
        const int64_t at = (by_token ? sequence.begin + position : position) * head_dim;
        elementwise_kernels().rotate(cos + at, sin + at, row, head_dim);
    }
};

struct Attention {
    LowRankSparseLayer q, k, v, o;
    std::vector<Sequence> sequences;
    int64_t heads, kv_heads, head_dim;
    bool causal;
    float scale;
    std::optional<Mask> mask;
    Rotary rotary;
    const Input& x;
    const Ending& ending;

    int64_t group() const { return heads / kv_heads; }
};

// z of every token, and of the context that O reads.
struct Intermediates {
    Rows<float> q, v;
    // Of K: rows as of q, or where nothing turns K, [columns, length] for one sequence after the other,
    // because K^T is what the scores need.
    Rows<float> k_rows{nullptr, 0};
    float* k_columns = nullptr;
    Rows<float> context;
};

// z of some tokens of one sequence.
void project_tokens(const Attention& attention, const Sequence& sequence, int64_t begin, int64_t end,
                    const Intermediates& to) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const int64_t in = attention.q.in, size = end - begin, first = sequence.begin + begin;
    const auto room = scratch(attention.x.room(size));
    const float* x = attention.x.rows(first, first + size, room.get());
    const auto project = [&](const LowRankSparseLayer& layer, const Rows<float>& z) {
        products.project(layer, {x, in}, size, 0, layer.columns(), {z[first], z.stride});
    };
    project(attention.q, to.q);
    project(attention.v, to.v);
    if (attention.rotary) {
        project(attention.k, to.k_rows);
    } else {
        const int64_t columns = attention.k.columns();
        const LowRankSparseLayer x_as_weights{in, size, 0, x, nullptr, nullptr, {}};
        products.project(x_as_weights, {attention.k.down, in}, columns, 0, size,
                         {to.k_columns + sequence.begin * columns + begin, sequence.length});
    }
}

// Memory for one head of a sequence of at most `longest` tokens.
struct HeadRoom {
    int64_t pitch;  // row length of the scores
    std::unique_ptr<float[]> own;
    float *panel, *keys, *values, *rows, *queries, *scores, *mask;

    HeadRoom(int64_t longest, int64_t head_dim) : pitch(padded(longest)) {
        const int64_t head = longest * head_dim, query = kMostQueries * head_dim;
        // Short sequences have the most queries at a time.
        const int64_t most = std::max(kTileRows * pitch, std::min(kMostQueries * pitch, 2 * kScores));
        own = scratch(kSumDepth * kSumWidth + 3 * head + query + most + longest);
        panel = own.get();
        keys = panel + kSumDepth * kSumWidth;
        values = keys + head;
        rows = values + head;
        queries = rows + head;
        scores = queries + query;
        mask = scores + most;
    }
};

// Columns of one head of z up + kept columns + bias, [rows, head_dim].
void build_head(const LowRankSparseLayer& layer, Rows<const float> z, int64_t rows, int64_t head,
                int64_t head_dim, float* panel, float* to) {
    const int64_t begin = head * head_dim;
    lowrank_sparse_kernels().expand(layer, z, rows, begin, begin + head_dim, {to - begin, head_dim}, panel);
}

// K^T [head_dim, length] of one key head.
void build_keys(const Attention& attention, const Sequence& sequence, int64_t head, const Intermediates& from,
                const HeadRoom& room) {
    const LowRankSparseLayer& layer = attention.k;
    const int64_t length = sequence.length, head_dim = attention.head_dim, begin = head * head_dim;
    if (attention.rotary) {
        const Rows<float>& z = from.k_rows;
        build_head(layer, {z[sequence.begin], z.stride}, length, head, head_dim, room.panel, room.rows);
        for (int64_t token = 0; token < length; ++token) {
            float* row = room.rows + token * head_dim;
            attention.rotary.turn(sequence, token, row, head_dim);
            for (int64_t dim = 0; dim < head_dim; ++dim) room.keys[dim * length + token] = row[dim];
        }
        return;
    }
    // The bias of K adds the same to every score of a query, which the softmax takes off again.
    const float* z = from.k_columns + sequence.begin * layer.columns();
    const LowRankSparseLayer z_as_weights{0, layer.rank, length, nullptr, z, nullptr, {}};
    lowrank_sparse_kernels().expand_transposed(z_as_weights, {layer.up + begin, layer.out}, head_dim, 0,
                                               length, {room.keys, length}, room.panel);
    for (int64_t j = 0; j < layer.kept.size; ++j) {
        const int64_t dim = layer.kept[j] - begin;
        if (dim < 0 || dim >= head_dim) continue;
        for (int64_t token = 0; token < length; ++token) {
            room.keys[dim * length + token] += z[(layer.rank + j) * length + token];
        }
    }
}

// The context of some queries of one head, from K^T and V of its key head.
void attend(const Attention& attention, int64_t index, int64_t head, int64_t begin, int64_t end,
            const Intermediates& to, const HeadRoom& room) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const ElementwiseKernels& single = elementwise_kernels();
    const Sequence& sequence = attention.sequences[index];
    const int64_t head_dim = attention.head_dim, size = end - begin, first = sequence.begin + begin;
    const int64_t keys = attention.causal ? end : sequence.length, pitch = padded(sequence.length);
    build_head(attention.q, {to.q[first], to.q.stride}, size, head, head_dim, room.panel, room.queries);
    if (attention.rotary) {
        for (int64_t row = 0; row < size; ++row) {
            attention.rotary.turn(sequence, begin + row, room.queries + row * head_dim, head_dim);
        }
    }
    const LowRankSparseLayer keys_as_weights{0, head_dim, sequence.length, nullptr, room.keys, nullptr, {}};
    products.expand(keys_as_weights, {room.queries, head_dim}, size, 0, keys, {room.scores, pitch},
                    room.panel);
    const float* bias = nullptr;
    float sums[kMostQueries];
    for (int64_t row = 0; row < size; ++row) {
        float* scores = room.scores + row * pitch;
        if (attention.mask && (row == 0 || !attention.mask->same_for_all_queries())) {
            bias = attention.mask->row(index, head, begin + row, keys, room.mask);
        }
        const int64_t allowed = attention.causal ? begin + row + 1 : keys;
        sums[row] = single.exponentials(attention.scale, bias, scores, allowed);
        std::fill(scores + allowed, scores + keys, 0.0f);
    }
    const LowRankSparseLayer values_as_weights{0, keys, head_dim, nullptr, room.values, nullptr, {}};
    const Rows<float> context = {to.context[first] + head * head_dim, to.context.stride};
    products.expand(values_as_weights, {room.scores, pitch}, size, 0, head_dim, context, room.panel);
    for (int64_t row = 0; row < size; ++row) {
        single.multiply(sums[row] == 0.0f ? 0.0f : 1.0f / sums[row], context[row], head_dim);
    }
}

// All query heads of one key head for part `part` of `parts` of a sequence's queries.
void attend_group(const Attention& attention, int64_t index, int64_t kv_head, int64_t part, int64_t parts,
                  const Intermediates& to, const HeadRoom& room) {
    const Sequence& sequence = attention.sequences[index];
    // In whole blocks, so that the parts do not change them.
    const int64_t block = query_block(sequence.length), blocks = ceil_div(sequence.length, block);
    const int64_t begin = blocks * part / parts * block;
    const int64_t end = std::min(blocks * (part + 1) / parts * block, sequence.length);
    if (begin >= end) return;
    build_keys(attention, sequence, kv_head, to, room);
    build_head(attention.v, {to.v[sequence.begin], to.v.stride}, sequence.length, kv_head, attention.head_dim,
               room.panel, room.values);
    for (int64_t head = kv_head * attention.group(); head < (kv_head + 1) * attention.group(); ++head) {
        for (int64_t query = begin; query < end; query += block) {
            attend(attention, index, head, query, std::min(query + block, end), to, room);
        }
    }
}

// y of the tokens [begin, end) from their context.
void close_tokens(const Attention& attention, int64_t begin, int64_t end, Rows<const float> context) {
    const LowRankSparseKernels& products = lowrank_sparse_kernels();
    const LowRankSparseLayer& o = attention.o;
    const int64_t size = end - begin;
    const auto own =
        scratch(kSumDepth * kSumWidth + size * padded(o.columns()) + attention.ending.room(size));
    const Rows<float> z = {own.get() + kSumDepth * kSumWidth, padded(o.columns())};
    products.project(o, {context[begin], context.stride}, size, 0, o.columns(), z);
    products.expand(o, {z.data, z.stride}, size, 0, o.out, {attention.ending.rows(begin, z[size]), o.out},
                    own.get());
    attention.ending.finish(begin, end, z[size]);
}

// task(sequence, first, last) for parts of all sequences, each of about `rows` tokens.
template <class Task>
void share_out_tokens(const std::vector<Sequence>& sequences, int64_t rows, int64_t work, const Task& task) {
    std::vector<int64_t> parts{0};  // of the sequences before
    for (const Sequence& sequence : sequences)
        parts.push_back(parts.back() + ceil_div(sequence.length, rows));
    share_out(parts.back(), 1, rows * work, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const auto after = std::upper_bound(parts.begin(), parts.end(), part);
            const Sequence& sequence = sequences[after - parts.begin() - 1];
            const int64_t count = *after - *(after - 1), i = part - *(after - 1);
            task(sequence, sequence.length * i / count, sequence.length * (i + 1) / count);
        }
    });
}

void forward(const Attention& attention) {
    const LowRankSparseLayer &q = attention.q, &k = attention.k, &v = attention.v, &o = attention.o;
    const std::vector<Sequence>& sequences = attention.sequences;
    const int64_t tokens = attention.x.count(), heads = attention.heads, kv_heads = attention.kv_heads;
    const int64_t head_dim = attention.head_dim;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t q_pitch = padded(q.columns()), v_pitch = padded(v.columns());
    const int64_t k_pitch = attention.rotary ? padded(k.columns()) : k.columns();
    const auto z = scratch(tokens * (q_pitch + k_pitch + v_pitch + heads * head_dim));
    Intermediates to;
    to.q = {z.get(), q_pitch};
    to.v = {to.q[tokens], v_pitch};
    to.context = {to.v[tokens], heads * head_dim};
    to.k_columns = to.context[tokens];
    to.k_rows = {to.k_columns, k_pitch};
    const int64_t rows = std::min(kBlockRows, ceil_div(tokens, threads));
    share_out_tokens(sequences, rows, q.in * (q.columns() + k.columns() + v.columns()),
                     [&](const Sequence& sequence, int64_t begin, int64_t end) {
                         project_tokens(attention, sequence, begin, end, to);
                     });
    int64_t longest = 0;
    for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.length);
    // Where heads are fewer than threads, several share the queries of one and each builds its keys.
    const int64_t pairs = static_cast<int64_t>(sequences.size()) * kv_heads;
    const int64_t parts =
        std::clamp<int64_t>(ceil_div(threads, pairs), 1, ceil_div(longest, query_block(longest)));
    const int64_t work = longest * head_dim * (q.rank + k.rank + v.rank + 2 * longest);
    share_out(pairs * parts, 1, work, [&](int64_t begin, int64_t end) {
        const HeadRoom room(longest, head_dim);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t pair = i / parts;
            attend_group(attention, pair / kv_heads, pair % kv_heads, i % parts, parts, to, room);
        }
    });
    const int64_t blocks = std::min(tokens, ceil_div(ceil_div(tokens, kBlockRows), threads) * threads);
    share_out(blocks, 1, tokens / blocks * (o.in * o.columns() + o.out * o.rank),
              [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                      close_tokens(attention, tokens * i / blocks, tokens * (i + 1) / blocks,
                                   {to.context.data, to.context.stride});
                  }
              });
}

// Sequences of one length, or as cu_seqlens tells; empty ones are left out where nothing is numbered by them.
std::vector<Sequence> sequences_of(const char* op, const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
    std::vector<Sequence> sequences;
    if (!cu_seqlens) {
        if (x.dim() != 3) invalid(op, ": x has shape ", shape_of(x), ", expected [batch, length, in]");
        for (int64_t i = 0; i < x.size(0); ++i) sequences.push_back({i * x.size(1), x.size(1)});
        return sequences;
    }
    if (x.dim() != 2) invalid(op, ": x has shape ", shape_of(x), ", expected [tokens, in] with cu_seqlens");
    const Tensor bounds = as_contiguous(*cu_seqlens);
    const bool narrow = bounds.scalar_type() == ScalarType::Int;
    if (bounds.dim() != 1 || bounds.size(0) < 1 || !bounds.is_cpu() ||
        (!narrow && bounds.scalar_type() != ScalarType::Long)) {
        invalid(op, ": cu_seqlens has shape ", shape_of(bounds), ", expected int32 or int64 [sequences + 1]");
    }
    const auto bound = [&](int64_t i) {
        const void* data = bounds.const_data_ptr();
        return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
    };
    const int64_t count = bounds.size(0) - 1;
    bool valid = bound(0) == 0 && bound(count) == x.size(0);
    for (int64_t i = 0; i < count; ++i) {
        valid = valid && bound(i) <= bound(i + 1);
        if (bound(i + 1) > bound(i)) sequences.push_back({bound(i), bound(i + 1) - bound(i)});
    }
    if (!valid) {
        invalid(op, ": cu_seqlens begins with ", bound(0), " and ends with ", bound(count),
                ", expected ascending positions from 0 to ", x.size(0), " (the tokens of x)");
    }
    return sequences;
}

// Parts of the packed matrix and bias of Q, K and V, one layer's after the other's.
class Packed {
  public:
    Packed(const char* op, const Tensor& down, const std::optional<Tensor>& bias)
        : op_(op), down_(as_contiguous(down)), bias_(bias) {
        check_matrix(op, "down_qkv", down_);
        if (bias_ && bias_->dim() != 1)
            invalid(op, ": bias_qkv has shape ", shape_of(*bias_), ", expected one dimension");
        if (bias_) bias_ = as_contiguous(*bias_);
    }

    Arguments next(ScalarType dtype, const Tensor& up, const std::optional<Tensor>& kept) {
        check_matrix(op_, "up_q, up_k, up_v", up);
        const int64_t in = down_.size(1), size = up.size(0) + (kept ? kept->numel() : 0), out = up.size(1);
        if (row_ + size > down_.size(0) || (bias_ && column_ + out > bias_->numel())) {
            invalid(op_, ": down_qkv, bias_qkv: expected at least ", row_ + size, " rows and ", column_ + out,
                    " entries");
        }
        const Tensor down = view(down_, {size, in}, {in, 1}, row_ * in);
        std::optional<Tensor> bias;
        if (bias_) bias = view(*bias_, {out}, {1}, column_);
        row_ += size;
        column_ += out;
        return widened_layer(op_, dtype, in, down, up, kept, bias);
    }

    void check_used_up() const {
        if (row_ != down_.size(0) || (bias_ && column_ != bias_->numel())) {
            invalid(op_, ": down_qkv, bias_qkv: expected ", row_, " rows and ", column_, " entries");
        }
    }

  private:
    const char* op_;
    Tensor down_;
    std::optional<Tensor> bias_;
    int64_t row_ = 0, column_ = 0;
};

// [length, head_dim] for all sequences, or the same of every token; contiguous.
Tensor angles(const char* op, const char* name, const Tensor& table, int64_t length, int64_t tokens,
              int64_t head_dim) {
    check_dtype(op, name, table, ScalarType::Float);
    const int64_t entries = table.numel();
    if (table.dim() < 2 || table.size(-1) != head_dim ||
        (entries != length * head_dim && entries != tokens * head_dim)) {
        invalid(op, ": ", name, " has shape ", shape_of(table), ", expected [", length, ", ", head_dim, "]");
    }
    return as_contiguous(table);
}

Tensor lowrank_attention_forward(
    Tensor x, Tensor down_qkv, Tensor up_q, std::optional<Tensor> kept_q, Tensor up_k,
    std::optional<Tensor> kept_k, Tensor up_v, std::optional<Tensor> kept_v, std::optional<Tensor> bias_qkv,
    Tensor down_o, Tensor up_o, std::optional<Tensor> kept_o, std::optional<Tensor> bias_o,
    std::optional<Tensor> residual, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
    std::optional<Tensor> attn_mask, std::optional<Tensor> cu_seqlens, std::optional<Tensor> cos,
    std::optional<Tensor> sin, std::optional<int64_t> /* the longest is looked up */, int64_t num_heads,
    int64_t num_kv_heads, bool is_causal, double scale, std::string norm, double epsilon) {
    constexpr const char* op = "lowrank_attention_forward";
    check_block_dtype(op, x);
    const ScalarType dtype = x.scalar_type();
    Packed packed(op, down_qkv, bias_qkv);
    const Arguments q = packed.next(dtype, up_q, kept_q);
    const Arguments k = packed.next(dtype, up_k, kept_k);
    const Arguments v = packed.next(dtype, up_v, kept_v);
    packed.check_used_up();
    if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
        invalid(op, ": num_heads is ", num_heads, ", num_kv_heads ", num_kv_heads,
                ", expected at least 1 and the latter a divisor of the former");
    }
    const int64_t head_dim = q.layer.out / num_heads;
    if (x.size(-1) != q.layer.in || q.layer.out != num_heads * head_dim ||
        k.layer.out != num_kv_heads * head_dim || v.layer.out != k.layer.out) {
        invalid(op, ": x has shape ", shape_of(x), ", Q, K and V have ", q.layer.in, " inputs and ",
                q.layer.out, ", ", k.layer.out, " and ", v.layer.out, " outputs for ", num_heads, " and ",
                num_kv_heads, " heads");
    }
    const Arguments o = widened_layer(op, dtype, q.layer.out, down_o, up_o, kept_o, bias_o);
    const Tensor y = empty(with_last(x, o.layer.out), dtype_of(x));
    const Input input(x);
    const Ending ending(op, y, residual, norm_weight, norm_bias, norm, epsilon);
    Attention attention{q.layer,   k.layer,      v.layer,  o.layer,   sequences_of(op, x, cu_seqlens),
                        num_heads, num_kv_heads, head_dim, is_causal, static_cast<float>(scale),
                        {},        {},           input,    ending};
    if (attn_mask) {
        if (cu_seqlens) invalid(op, ": attn_mask is given together with cu_seqlens");
        attention.mask.emplace(op, *attn_mask,
                               std::vector<int64_t>{x.size(0), num_heads, x.size(1), x.size(1)});
    }
    if (cos.has_value() != sin.has_value()) invalid(op, ": cos and sin go together");
    if (cos) {
        const int64_t length = x.size(-2), tokens = input.count();
        cos = angles(op, "cos", *cos, length, tokens, head_dim);
        sin = angles(op, "sin", *sin, length, tokens, head_dim);
        if (cos->numel() != sin->numel()) invalid(op, ": cos and sin have different shapes");
        attention.rotary = {floats(*cos), floats(*sin), cu_seqlens || cos->numel() != length * head_dim};
    }
    if (y.numel() > 0 && head_dim > 0) forward(attention);
    return y;
}

}  // namespace
}  // namespace lpaf::cpu

STABLE_TORCH_LIBRARY_IMPL(lpaf_kernels, CPU, m) {
    m.impl("lowrank_attention_forward", TORCH_BOX(&lpaf::cpu::lowrank_attention_forward));
}
