// Sharing work out among torch's threads, and which instruction set the processor has.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>

#include <torch/csrc/stable/ops.h>

namespace lpaf::cpu {

// Multiplications per parallel task at least: below this, starting threads costs more than the work.
constexpr int64_t kGrain = 1 << 17;

#if defined(__x86_64__)
// Of what was compiled once per instruction set, the best that the processor has, or less where
// ATEN_CPU_CAPABILITY, torch's own variable, asks for less.
template <class Table>
const Table& for_this_processor(const Table& baseline, const Table& avx2, const Table& avx512) {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = capability == nullptr ? "avx512" : capability;
    if (most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return most != "avx2" && __builtin_cpu_supports("avx512f") ? avx512 : avx2;
    }
    return baseline;
}
#endif

// Uninitialised floats to work in.
inline std::unique_ptr<float[]> scratch(int64_t size) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(size)]);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Tasks on ranges of [0, size) that begin at multiples of `unit`; one entry of the range is `work`
// multiplications.
template <class Task>
void share_out(int64_t size, int64_t unit, int64_t work, const Task& task) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, unit * work));
    torch::stable::parallel_for(0, ceil_div(size, unit), grain, [&](int64_t begin, int64_t end) {
        task(begin * unit, std::min(end * unit, size));
    });
}

// Room for one row of z or d z: an odd number of cache lines, because rows at a multiple of a page would
// evict each other.
inline int64_t padded(int64_t columns) {
    return ceil_div(columns, 32) * 32 + 16;
}

}  // namespace lpaf::cpu
