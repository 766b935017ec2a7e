// The functions of elementwise.h, compiled once per instruction set: LPAF_ELEMENTWISE names the table that
// this compilation defines.
#include "cpu/elementwise.h"

#include "cpu/vector.h"

namespace lpaf::cpu {
namespace {

inline Vector splat(float value) {
    Vector vector;
    for (int lane = 0; lane < kLanes; ++lane) vector[lane] = value;
    return vector;
}

inline Vector select(IntVector condition, Vector yes, Vector no) {
    return (Vector)((condition & (IntVector)yes) | (~condition & (IntVector)no));
}

inline Vector absolute(Vector x) {
    return (Vector)((IntVector)x & 0x7fffffff);
}

// e^x to a rounding or two; NaN stays NaN, what is too large or small for a float becomes about 1e38 or
// 1e-38.
inline Vector exponential(Vector x) {
    // 2^n e^r with |r| <= ln 2 / 2: adding 1.5 * 2^23 leaves the nearest integer n in the low bits of the
    // mantissa.
    const Vector bounded = select(x > 88.0f, splat(88.0f), select(x < -87.0f, splat(-87.0f), x));
    const Vector shifted = bounded * 1.44269504f + 12582912.0f;
    const Vector n = shifted - 12582912.0f;
    const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    Vector power = r * (1.0f / 5040) + 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    return power * (Vector)(((IntVector)shifted - 0x4b400000 + 127) << 23);
}

inline Vector tanh(Vector x) {
    const Vector size = absolute(x), square = x * x;
    // 1 - 2 / (e^(2 x) + 1) loses digits near 0: there the odd series, to x^13.
    Vector series = square * (21844.0f / 6081075) - 1382.0f / 155925;
    series = series * square + 62.0f / 2835;
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    series = series * square * x + x;
    const Vector large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return select(size < 0.45f, series, select(x < 0.0f, -large, large));
}

// x times the normal distribution function.
inline Vector gelu(Vector x) {
    // The upper tail Q(|x|) = e^(-x^2 / 2) R(t), t = 1 / (1 + 0.275 |x|). R is the polynomial without a
    // constant whose largest |x| Q error on [0, 14] is the least at this degree (1.1e-8), found by Lawson's
    // iteration.
    const Vector size = absolute(x);
    const Vector t = 1.0f / (0.275f * size + 1.0f);
    Vector tail = t * -0.113775916f + 0.447660416f;
    tail = tail * t - 0.324086934f;
    tail = tail * t + 0.328474432f;
    tail = tail * t + 0.0442520306f;
    tail = tail * t + 0.117476001f;
    tail = tail * t * exponential(-0.5f * size * size);
    // x Phi(x): -|x| Q for negative x, and x - |x| Q for positive. Beyond 20 Q is 0, and infinity times it
    // would be NaN.
    const Vector lost = select(size > 20.0f, splat(20.0f), size) * tail;
    return select(x < 0.0f, -lost, x - lost);
}

template <Activation A>
inline Vector apply(Vector x) {
    if constexpr (A == Activation::kGelu) return gelu(x);
    if constexpr (A == Activation::kGeluTanh) {
        return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x)));
    }
    if constexpr (A == Activation::kRelu) return select(x < 0.0f, splat(0.0f), x);
    if constexpr (A == Activation::kLeakyRelu) return select(x < 0.0f, 0.01f * x, x);
    if constexpr (A == Activation::kSilu) return x / (1.0f + exponential(-x));
    if constexpr (A == Activation::kTanh) return tanh(x);
    return x;
}

// values = combine(act(gate), values) for whole vectors, then for what is left.
template <Activation A, bool Gated>
void run(const float* gate, float* values, std::int64_t size) {
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
        const Vector activated = apply<A>(load(gate + at));
        store(values + at, Gated ? activated * load(values + at) : activated);
    }
    if (at < size) {
        const Vector activated = apply<A>(load_first(gate + at, size - at));
        const Vector result = Gated ? activated * load_first(values + at, size - at) : activated;
        store_first(values + at, result, size - at);
    }
}

template <bool Gated>
void choose(Activation activation, const float* gate, float* values, std::int64_t size) {
    switch (activation) {
        case Activation::kNone: return Gated ? run<Activation::kNone, Gated>(gate, values, size) : void();
        case Activation::kGelu: return run<Activation::kGelu, Gated>(gate, values, size);
        case Activation::kGeluTanh: return run<Activation::kGeluTanh, Gated>(gate, values, size);
        case Activation::kRelu: return run<Activation::kRelu, Gated>(gate, values, size);
        case Activation::kLeakyRelu: return run<Activation::kLeakyRelu, Gated>(gate, values, size);
        case Activation::kSilu: return run<Activation::kSilu, Gated>(gate, values, size);
        case Activation::kTanh: return run<Activation::kTanh, Gated>(gate, values, size);
    }
}

void activate(Activation activation, float* values, std::int64_t size) {
    choose<false>(activation, values, values, size);
}

void activate_gate(Activation activation, const float* gate, float* values, std::int64_t size) {
    choose<true>(activation, gate, values, size);
}

inline float sum_of(Vector vector) {
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += vector[lane];
    return sum;
}

// The sum over a row of term(vector of entries); lanes beyond the row's end are left out.
template <class Term>
inline float sum_row(const float* row, std::int64_t size, const Term& term) {
    Vector sum = {};
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) sum += term(load(row + at));
    float total = sum_of(sum);
    if (at < size) {
        const Vector last = term(load_first(row + at, size - at));
        for (std::int64_t lane = 0; lane < size - at; ++lane) total += last[lane];
    }
    return total;
}

template <class Change>
inline void change_row(float* row, std::int64_t size, const Change& change) {
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
        store(row + at, change(load(row + at), [at](const float* from) { return load(from + at); }));
    }
    if (at < size) {
        const std::int64_t left = size - at;
        const auto load_at = [at, left](const float* from) { return load_first(from + at, left); };
        store_first(row + at, change(load_first(row + at, left), load_at), left);
    }
}

void normalise(const Norm& norm, const float* residual, float* row, std::int64_t size) {
    if (residual != nullptr) {
        change_row(row, size,
                   [&](Vector entries, const auto& load_at) { return entries + load_at(residual); });
    }
    if (norm.kind == Norm::Kind::kNone) return;
    const float count = static_cast<float>(size);
    float mean = 0;
    if (norm.kind == Norm::Kind::kLayer)
        mean = sum_row(row, size, [](Vector entries) { return entries; }) / count;
    const float square =
        sum_row(row, size, [mean](Vector entries) { return (entries - mean) * (entries - mean); });
    const float scale = 1.0f / __builtin_sqrtf(square / count + norm.epsilon);
    change_row(row, size, [&](Vector entries, const auto& load_at) {
        const Vector scaled = (entries - mean) * scale * load_at(norm.weight);
        return norm.bias == nullptr ? scaled : scaled + load_at(norm.bias);
    });
}

inline Vector larger(Vector a, Vector b) {
    return select(a > b, a, b);
}

// row = scale row + bias and its maximum, -inf for an empty row.
inline float scale_scores(float scale, const float* bias, float* row, std::int64_t size) {
    Vector most = splat(-__builtin_inff());
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
        Vector scores = load(row + at) * scale;
        if (bias != nullptr) scores += load(bias + at);
        store(row + at, scores);
        most = larger(scores, most);
    }
    float maximum = -__builtin_inff();
    for (; at < size; ++at) {
        row[at] = row[at] * scale + (bias != nullptr ? bias[at] : 0.0f);
        maximum = row[at] > maximum ? row[at] : maximum;
    }
    for (int lane = 0; lane < kLanes; ++lane) maximum = most[lane] > maximum ? most[lane] : maximum;
    return maximum;
}

float exponentials(float scale, const float* bias, float* row, std::int64_t size) {
    const float maximum = scale_scores(scale, bias, row, size);
    if (maximum == -__builtin_inff()) {
        for (std::int64_t at = 0; at < size; ++at) row[at] = row[at] != row[at] ? row[at] : 0.0f;
        return sum_row(row, size, [](Vector entries) { return entries; });
    }
    // What is so far below the maximum that a float barely holds it counts for nothing.
    change_row(row, size, [maximum](Vector scores, const auto&) {
        const Vector below = scores - maximum;
        return select(below < -87.0f, splat(0.0f), exponential(below));
    });
    return sum_row(row, size, [](Vector entries) { return entries; });
}

float length(const float* row, std::int64_t size) {
    return __builtin_sqrtf(sum_row(row, size, [](Vector entries) { return entries * entries; }));
}

void multiply(float factor, float* values, std::int64_t size) {
    change_row(values, size, [factor](Vector entries, const auto&) { return entries * factor; });
}

void rotate(const float* cos, const float* sin, float* row, std::int64_t size) {
    const std::int64_t half = size / 2;
    std::int64_t at = 0;
    const auto turn = [&](Vector first, Vector second, const auto& load_at, const auto& store_at) {
        store_at(row + at, first * load_at(cos + at) - second * load_at(sin + at));
        store_at(row + half + at, second * load_at(cos + half + at) + first * load_at(sin + half + at));
    };
    for (; at + kLanes <= half; at += kLanes) turn(load(row + at), load(row + half + at), load, store);
    if (at < half) {
        const std::int64_t left = half - at;
        turn(
            load_first(row + at, left), load_first(row + half + at, left),
            [left](const float* from) { return load_first(from, left); },
            [left](float* to, Vector vector) { store_first(to, vector, left); });
    }
}

inline Vector widened(HalfVector half) {
    return (Vector)(__builtin_convertvector(half, IntVector) << 16);
}

inline HalfVector narrowed(Vector values) {
    const IntVector bits = (IntVector)values;
    const IntVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN to infinity: it becomes a quiet one.
    const IntVector quiet = (bits >> 16) | 0x40;
    const IntVector is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HalfVector);
}

void widen(const std::uint16_t* from, float* to, std::int64_t size) {
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
        HalfVector half;
        __builtin_memcpy(&half, from + at, sizeof half);
        store(to + at, widened(half));
    }
    if (at < size) {
        HalfVector half = {};
        for (std::int64_t lane = 0; lane < size - at; ++lane) half[lane] = from[at + lane];
        store_first(to + at, widened(half), size - at);
    }
}

void narrow(const float* from, std::uint16_t* to, std::int64_t size) {
    std::int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) {
        const HalfVector half = narrowed(load(from + at));
        __builtin_memcpy(to + at, &half, sizeof half);
    }
    if (at < size) {
        const HalfVector half = narrowed(load_first(from + at, size - at));
        for (std::int64_t lane = 0; lane < size - at; ++lane) to[at + lane] = half[lane];
    }
}

}  // namespace

const ElementwiseKernels LPAF_ELEMENTWISE = {activate, activate_gate, normalise, exponentials, length,
                                             multiply, rotate,        widen,     narrow};

}  // namespace lpaf::cpu
