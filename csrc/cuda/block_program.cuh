// A kernel as phases between barriers. On the GPU every thread of a block runs each phase, then waits for the
// others. Under a host compiler one thread takes the turns of all, so that a test needs no GPU.
//
// A program is a class with
//   kThreads, kBlocksPerProcessor   its launch bounds;
//   Arguments, Shared               plain structs: what a launch passes, and the shared memory of a block;
//   Program(arguments, shared, block), and run(each), where each(phase) calls phase(thread) for every thread.
// What run() itself reads is the same for all threads. Whole warps call the functions that begin with warp_.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LPAF_DEVICE __device__
#else
#define LPAF_DEVICE
#endif

namespace lpaf::cuda {

template <class To, class From>
LPAF_DEVICE To from_bits(From bits) {
    static_assert(sizeof(To) == sizeof(From));
    To value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

#ifdef __CUDACC__

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Tells the compiler about a pointer that was read from memory.
template <class T>
__device__ T* in_global(T* pointer) {
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}

// Both return the old value.
template <class T>
__device__ T atomic_add(T* target, T amount) {
    return atomicAdd(target, amount);
}
__device__ inline unsigned atomic_or(unsigned* target, unsigned bits) {
    return atomicOr(target, bits);
}

// What was written before is seen by whoever sees what is written after.
__device__ inline void memory_fence() {
    __threadfence();
}

// Whether `holds` on every lane and all have the same key.
__device__ inline bool warp_agrees(unsigned key, bool holds) {
    const bool is_same = __shfl_sync(kAllLanes, key, 0) == key;
    return __all_sync(kAllLanes, holds && is_same);
}
__device__ inline bool warp_leader() {
    return threadIdx.x % 32 == 0;
}
__device__ inline unsigned warp_sum(unsigned amount) {
    return __reduce_add_sync(kAllLanes, amount);
}
__device__ inline unsigned long long warp_sum(unsigned long long amount) {
    for (int lane = 16; lane > 0; lane /= 2) amount += __shfl_xor_sync(kAllLanes, amount, lane);
    return amount;
}

// a * b, never fused with what is added to it.
__device__ inline double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}

struct EachThread {
    template <class Phase>
    __device__ void operator()(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

template <class Program>
__global__ void __launch_bounds__(Program::kThreads, Program::kBlocksPerProcessor)
    program_kernel(const __grid_constant__ typename Program::Arguments arguments) {
    static_assert(sizeof(typename Program::Arguments) <= 32764, "more than a kernel's parameters may hold");
    __shared__ typename Program::Shared shared;
    Program(arguments, shared, static_cast<std::int64_t>(blockIdx.x)).run(EachThread{});
}

#else  // one block at a time, one thread at a time, one lane per warp

template <class T>
T* in_global(T* pointer) {
    return pointer;
}
template <class T>
T atomic_add(T* target, T amount) {
    const T old = *target;
    *target += amount;
    return old;
}
inline unsigned atomic_or(unsigned* target, unsigned bits) {
    const unsigned old = *target;
    *target |= bits;
    return old;
}
inline void memory_fence() {}
inline bool warp_agrees(unsigned, bool holds) {
    return holds;
}
inline bool warp_leader() {
    return true;
}
template <class T>
T warp_sum(T amount) {
    return amount;
}
inline double rounded_product(double a, double b) {
    return a * b;
}

#endif

}  // namespace lpaf::cuda
