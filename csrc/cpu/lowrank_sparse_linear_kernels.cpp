// The tiles of lowrank_sparse_linear.h, compiled once per instruction set: LPAF_KERNELS names the table that
// this compilation defines. Nothing of the standard library is called: a function that the linker shares
// between the compilations would carry one instruction set's code into the others.
#include <cstdint>
#include <utility>

#include "cpu/lowrank_sparse_linear.h"

#include "cpu/vector.h"

namespace lpaf::cpu {
namespace {

// Calls work(first, integral_constant<int, n>) for tiles of n rows that cover `rows`, as even as Largest
// allows.
template <int Largest, class Work>
inline void for_row_tiles(std::int64_t rows, const Work& work) {
    const std::int64_t tiles = ceil_div(rows, Largest);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t first = rows * tile / tiles;
        const std::int64_t size = rows * (tile + 1) / tiles - first;
        [&]<int... N>(std::integer_sequence<int, N...>) {
            (void)((size == N + 1 && (work(first, std::integral_constant<int, N + 1>{}), true)) || ...);
        }(std::make_integer_sequence<int, Largest>{});
    }
}

// Dot products: z = x down^T

constexpr int kDotRows = kRegisters == 32 ? 6 : 3;  // with kDotColumns columns the sums fill the registers
// Features per pass: the tile of x stays in the first-level cache, and few lanes do not sum too many entries
// each.
constexpr std::int64_t kDotDepth = kLanes > 4 ? 1376 : 688;
constexpr std::int64_t kDotBlock = 1 << 17;  // entries of down per pass: they stay in the second-level cache

// out[lane] = (a|b)[index(lane)]
template <class Index, int... Lane>
inline Vector shuffle(Vector a, Vector b, Index, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, Index{}(Lane)...);
}

// Lane j of the first four: the sum over the lanes of sums[j].
inline Vector sum_lanes(const Vector (&sums)[kDotColumns]) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    // In groups of four lanes: a0 b0 a1 b1 and a2 b2 a3 b3, then the halves of two such sums.
    const auto low = [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * kLanes; };
    const auto high = [](int lane) { return lane / 4 * 4 + 2 + lane % 4 / 2 + lane % 2 * kLanes; };
    const auto low_half = [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * kLanes; };
    const auto high_half = [](int lane) { return lane / 4 * 4 + 2 + lane % 2 + lane % 4 / 2 * kLanes; };
    const Vector a = shuffle(sums[0], sums[1], low, lanes) + shuffle(sums[0], sums[1], high, lanes);
    const Vector b = shuffle(sums[2], sums[3], low, lanes) + shuffle(sums[2], sums[3], high, lanes);
    Vector sum = shuffle(a, b, low_half, lanes) + shuffle(a, b, high_half, lanes);
    if constexpr (kLanes >= 16) {
        sum += shuffle(sum, sum, [](int lane) { return (lane + 8) % kLanes; }, lanes);
    }
    if constexpr (kLanes >= 8) {
        sum += shuffle(sum, sum, [](int lane) { return (lane + 4) % kLanes; }, lanes);
    }
    return sum;
}

// z[i][j] (+)= x[i] . down[j] over `depth` features, for N rows i and `columns` <= kDotColumns columns j.
template <int N>
inline void dot_tile(Rows<const float> x, Rows<const float> down, std::int64_t columns, std::int64_t depth,
                     bool first_pass, Rows<float> z) {
    const float* weights[kDotColumns];
    for (int j = 0; j < kDotColumns; ++j) weights[j] = down[smaller(j, columns - 1)];
    Vector sums[N][kDotColumns] = {};
    const auto add = [&](const auto& load_at) {
        Vector weight[kDotColumns];
        for (int j = 0; j < kDotColumns; ++j) weight[j] = load_at(weights[j]);
        for (int i = 0; i < N; ++i) {
            const Vector entry = load_at(x[i]);
            for (int j = 0; j < kDotColumns; ++j) sums[i][j] += entry * weight[j];
        }
    };
    std::int64_t feature = 0;
    for (; feature + kLanes <= depth; feature += kLanes) {
        add([feature](const float* row) { return load(row + feature); });
    }
    if (feature < depth) {
        add([feature, depth](const float* row) { return load_first(row + feature, depth - feature); });
    }
    for (int i = 0; i < N; ++i) {
        const Vector sum = sum_lanes(sums[i]);
        for (std::int64_t j = 0; j < columns; ++j) z[i][j] = first_pass ? sum[j] : z[i][j] + sum[j];
    }
}

// Features of one pass over `in` of them.
std::int64_t pass_depth(std::int64_t in) {
    const std::int64_t passes = in > kDotDepth ? ceil_div(in, kDotDepth) : 1;
    return ceil_div(ceil_div(in, passes), kLanes) * kLanes;
}

// z[:, begin:end] (+)= x down[begin:end, from:from + length]^T, x beginning with feature `from`.
inline void project_features(const LowRankSparseLayer& layer, std::int64_t from, std::int64_t length,
                             Rows<const float> x, std::int64_t rows, std::int64_t begin, std::int64_t end,
                             Rows<float> z) {
    const std::int64_t block =
        length > 0 ? (kDotBlock / length + 1) / kDotColumns * kDotColumns : end - begin;
    for (std::int64_t first = begin; first < end; first += block) {
        const std::int64_t last = smaller(first + block, end);
        for_row_tiles<kDotRows>(rows, [&](std::int64_t row, auto size) {
            for (std::int64_t j = first; j < last; j += kDotColumns) {
                dot_tile<size()>({x[row], x.stride}, {layer.down + j * layer.in + from, layer.in},
                                 smaller(kDotColumns, last - j), length, from == 0, {z[row] + j, z.stride});
            }
        });
    }
}

void project(const LowRankSparseLayer& layer, Rows<const float> x, std::int64_t rows, std::int64_t begin,
             std::int64_t end, Rows<float> z) {
    const std::int64_t depth = pass_depth(layer.in);
    std::int64_t from = 0;
    do {
        const std::int64_t length = smaller(depth, layer.in - from);
        project_features(layer, from, length, {x.data + from, x.stride}, rows, begin, end, z);
        from += depth;
    } while (from < layer.in);
}

void project_pass(const LowRankSparseLayer& layer, std::int64_t from, Rows<const float> x, std::int64_t rows,
                  Rows<float> z) {
    const std::int64_t length = smaller(pass_depth(layer.in), layer.in - from);
    project_features(layer, from, length, x, rows, 0, layer.columns(), z);
}

// Sums of rows: y = z up + bias, with the kept columns where z is stored as it is

constexpr int kSumRows =
    kRegisters == 32 ? 12 : 6;                      // with two vectors of outputs the sums fill the registers
constexpr int kFewRows = kRegisters == 32 ? 3 : 1;  // with eight
static_assert(8 * kLanes <= kSumWidth);

// Whether the factor z of z up is stored as it is, [rows, depth], or transposed, [depth, rows].
enum class Stored { kAsIs, kTransposed };

// y[i] = z[i] up + (bias, or y[i] itself where it is null) for N rows and V vectors of outputs.
template <int N, int V, Stored Z>
inline void sum_tile(Rows<const float> z, std::int64_t depth, Rows<const float> up, const float* bias,
                     Rows<float> y) {
    Vector sums[N][V] = {};
    for (int i = 0; i < N; ++i) {
        for (int v = 0; v < V; ++v) __builtin_prefetch(y[i] + v * kLanes, 1);
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vector weight[V];
        for (int v = 0; v < V; ++v) weight[v] = load(up[k] + v * kLanes);
        for (int i = 0; i < N; ++i) {
            const float entry = Z == Stored::kAsIs ? z[i][k] : z[k][i];
            for (int v = 0; v < V; ++v) sums[i][v] += entry * weight[v];
        }
    }
    for (int i = 0; i < N; ++i) {
        for (int v = 0; v < V; ++v) {
            float* to = y[i] + v * kLanes;
            // Last: in a sum that starts from a large bias every addition would round like that bias.
            store(to, load(bias != nullptr ? bias + v * kLanes : to) + sums[i][v]);
        }
    }
}

inline void copy(const float* from, std::int64_t size, float* to) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(size) * sizeof(float));
}

// Copies the first `columns` entries of each row to rows of `width` floats; what is left of them becomes 0.
template <int V>
inline void pack(Rows<const float> from, std::int64_t rows, std::int64_t columns, float* to) {
    for (std::int64_t row = 0; row < rows; ++row, to += V * kLanes) {
        if (columns == V * kLanes) {
            for (int v = 0; v < V; ++v) store(to + v * kLanes, load(from[row] + v * kLanes));
        } else {
            for (std::int64_t j = 0; j < V * kLanes; ++j) to[j] = j < columns ? from[row][j] : 0.0f;
        }
    }
}

// Columns [begin, end) in panels of V vectors, for tiles of up to Largest rows.
template <int V, int Largest, Stored Z>
inline void expand_panels(const LowRankSparseLayer& layer, Rows<const float> z, std::int64_t rows,
                          std::int64_t begin, std::int64_t end, Rows<float> y, float* panel) {
    constexpr std::int64_t width = V * kLanes;
    const std::int64_t passes = layer.rank > kSumDepth ? ceil_div(layer.rank, kSumDepth) : 1;
    const std::int64_t depth = ceil_div(layer.rank, passes);
    const KeptColumns kept = layer.kept;
    std::int64_t next = 0;
    while (next < kept.size && kept[next] < begin) ++next;
    for (std::int64_t column = begin; column < end; column += width) {
        const std::int64_t used = smaller(width, end - column);
        float bias[width] = {};
        if (layer.bias != nullptr) copy(layer.bias + column, used, bias);
        std::int64_t last = next;
        while (last < kept.size && kept[last] < column + used) ++last;
        for (std::int64_t pass = 0; pass < passes; ++pass) {
            const std::int64_t from = pass * depth, length = smaller(depth, layer.rank - from);
            Rows<const float> up = {layer.up + from * layer.out + column, layer.out};
            if (rows > 2 * Largest || used < width) {
                // Rows of `up` are far apart: they would evict each other and take a page each at every use.
                pack<V>(up, length, used, panel);
                up = {panel, width};
            }
            for_row_tiles<Largest>(rows, [&](std::int64_t row, auto size) {
                const Rows<const float> z_tile = {Z == Stored::kAsIs ? z[row] + from : z[from] + row,
                                                  z.stride};
                const Rows<float> y_tile = {y[row] + column, y.stride};
                float whole[size() * width];
                const Rows<float> to = used == width ? y_tile : Rows<float>{whole, width};
                if (used < width && pass > 0) {
                    for (int i = 0; i < size(); ++i) copy(y_tile[i], used, to[i]);
                }
                sum_tile<size(), V, Z>(z_tile, length, up, pass == 0 ? bias : nullptr, to);
                if (used < width) {
                    for (int i = 0; i < size(); ++i) copy(to[i], used, y_tile[i]);
                }
                if (pass + 1 < passes) return;
                for (int i = 0; i < size(); ++i) {
                    for (std::int64_t j = next; j < last; ++j)
                        y[row + i][kept[j]] += z[row + i][layer.rank + j];
                }
            });
        }
        next = last;
    }
}

template <Stored Z>
void expand(const LowRankSparseLayer& layer, Rows<const float> z, std::int64_t rows, std::int64_t begin,
            std::int64_t end, Rows<float> y, float* panel) {
    if (rows <= kFewRows) {
        expand_panels<8, kFewRows, Z>(layer, z, rows, begin, end, y, panel);
    } else {
        expand_panels<2, kSumRows, Z>(layer, z, rows, begin, end, y, panel);
    }
}

// Sums of columns: d bias

constexpr int kSumVectors = 4;

// Kahan's sums: each carries what the last addition lost. `load_at(row, v)` gives a row's vector v.
template <int V, class Load>
inline void sum_rows(std::int64_t rows, const Load& load_at, Vector (&sums)[V]) {
    Vector lost[V] = {};
    for (std::int64_t row = 0; row < rows; ++row) {
        for (int v = 0; v < V; ++v) {
            const Vector entry = load_at(row, v) - lost[v];
            const Vector sum = sums[v] + entry;
            lost[v] = (sum - sums[v]) - entry;
            sums[v] = sum;
        }
    }
    // An infinity makes what was lost NaN: then the plain sum says which infinity it is.
    for (int v = 0; v < V; ++v) {
        bool finite = true;
        for (int lane = 0; lane < kLanes; ++lane) finite &= sums[v][lane] - sums[v][lane] == 0.0f;
        if (finite) continue;
        sums[v] = Vector{};
        for (std::int64_t row = 0; row < rows; ++row) sums[v] += load_at(row, v);
    }
}

void sum_columns(Rows<const float> from, std::int64_t rows, std::int64_t begin, std::int64_t end, float* to) {
    std::int64_t column = begin;
    for (; column + kSumVectors * kLanes <= end; column += kSumVectors * kLanes) {
        Vector sums[kSumVectors] = {};
        sum_rows<kSumVectors>(
            rows, [&](std::int64_t row, int v) { return load(from[row] + column + v * kLanes); }, sums);
        for (int v = 0; v < kSumVectors; ++v) store(to + column + v * kLanes, sums[v]);
    }
    for (; column < end; column += kLanes) {
        const std::int64_t used = smaller(kLanes, end - column);
        Vector sums[1] = {};
        sum_rows<1>(rows, [&](std::int64_t row, int) { return load_first(from[row] + column, used); }, sums);
        for (std::int64_t j = 0; j < used; ++j) to[column + j] = sums[0][j];
    }
}

}  // namespace

const LowRankSparseKernels LPAF_KERNELS = {
    pass_depth, project, project_pass, expand<Stored::kAsIs>, expand<Stored::kTransposed>, sum_columns};

}  // namespace lpaf::cpu
