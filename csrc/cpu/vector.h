// Vectors of floats as wide as the instruction set that a file is compiled for. No torch, and nothing of the
// standard library that the linker would share between compilations for different sets: everything here has
// internal linkage.
#pragma once

#include <cstdint>

namespace lpaf::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntVector __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
typedef std::uint16_t HalfVector __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

inline Vector load(const float* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

// The first `size` lanes from memory, the others 0.
inline Vector load_first(const float* from, std::int64_t size) {
    Vector vector = {};
    for (std::int64_t lane = 0; lane < size; ++lane) vector[lane] = from[lane];
    return vector;
}

inline void store(float* to, Vector vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}

inline void store_first(float* to, Vector vector, std::int64_t size) {
    for (std::int64_t lane = 0; lane < size; ++lane) to[lane] = vector[lane];
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace
}  // namespace lpaf::cpu
