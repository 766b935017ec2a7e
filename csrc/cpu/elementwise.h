// What blocks do to the entries of float32 rows on the CPU, vectorised. No torch.
#pragma once

#include <cstdint>

namespace lpaf::cpu {

enum class Activation { kNone, kGelu, kGeluTanh, kRelu, kLeakyRelu, kSilu, kTanh };

// How the rows of a block's result are normalised; weight and bias have one entry per column, bias may be
// null.
struct Norm {
    enum class Kind { kNone, kLayer, kRms } kind = Kind::kNone;
    const float* weight = nullptr;
    const float* bias = nullptr;
    float epsilon = 0;
};

// As compiled for one instruction set.
struct ElementwiseKernels {
    // values = act(values)
    void (*activate)(Activation activation, float* values, std::int64_t size);
    // values = act(gate) values
    void (*activate_gate)(Activation activation, const float* gate, float* values, std::int64_t size);
    // row = norm(row + residual), residual may be null
    void (*normalise)(const Norm& norm, const float* residual, float* row, std::int64_t size);
    // row = e^(scores - their maximum) with scores = scale row + bias, bias may be null; returns its sum, 0
    // where every score is -inf
    float (*exponentials)(float scale, const float* bias, float* row, std::int64_t size);
    // The Euclidean length of a row
    float (*length)(const float* row, std::int64_t size);
    // values = factor values
    void (*multiply)(float factor, float* values, std::int64_t size);
    // Turns the first half of a row with the second: row cos + (-second, first) sin
    void (*rotate)(const float* cos, const float* sin, float* row, std::int64_t size);
    // bfloat16 to float32, and back with rounding to the nearest, ties to even
    void (*widen)(const std::uint16_t* from, float* to, std::int64_t size);
    void (*narrow)(const float* from, std::uint16_t* to, std::int64_t size);
};

extern const ElementwiseKernels kBaselineElementwise;
#if defined(__x86_64__)
extern const ElementwiseKernels kAvx2Elementwise;
extern const ElementwiseKernels kAvx512Elementwise;
#endif

}  // namespace lpaf::cpu
