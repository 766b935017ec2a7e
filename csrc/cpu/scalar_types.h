// 16-bit floating-point types for host code: storage plus conversions that compilers vectorise. No torch.
#pragma once

#include <bit>
#include <cstdint>

namespace lpaf::cpu {

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

// Every conversion is branch-free in its data: all cases are computed and one is selected.

inline float to_float(float value) {
    return value;
}

inline float to_float(BFloat16 value) {
    return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}

inline float to_float(Half value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = (value.bits & 0x7FFFu) << 13;  // exponent and fraction at float's places
    const std::uint32_t normal = magnitude + ((127u - 15u) << 23);
    const std::uint32_t special = normal + ((127u - 15u) << 23);  // exponent 31 becomes 255
    // A subnormal half is fraction * 2^-24: let the float unit normalise it.
    const float lowest_normal = std::bit_cast<float>(113u << 23);
    const float subnormal = std::bit_cast<float>(magnitude + (113u << 23)) - lowest_normal;
    const std::uint32_t below_special =
        magnitude < (1u << 23) ? std::bit_cast<std::uint32_t>(subnormal) : normal;
    return std::bit_cast<float>(sign | (magnitude >= (31u << 23) ? special : below_special));
}

template <class To>
To from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

// Round to nearest even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<std::uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

// Round to nearest even; overflow gives infinity, NaN stays NaN.
template <>
inline Half from_float<Half>(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
    // 0.5f has the spacing of half's subnormals, so adding it rounds to them.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(0.5f);
    const std::uint32_t overflow = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return {static_cast<std::uint16_t>(sign | (magnitude >= (143u << 23) ? overflow : finite))};
}

}  // namespace lpaf::cpu
