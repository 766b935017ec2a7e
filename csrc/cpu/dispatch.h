// Instruction-set dispatch of host kernels: one source, compiled for several levels, chosen when loaded.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
// The loader picks the best clone for the processor (GNU indirect functions).
#define LPAF_MULTIVERSION \
    __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), flatten))
#define LPAF_ISA_LEVELS "x86-64,x86-64-v3,x86-64-v4"
#elif defined(__x86_64__)
#define LPAF_MULTIVERSION
#define LPAF_ISA_LEVELS "x86-64"
#elif defined(__aarch64__)
#define LPAF_MULTIVERSION
#define LPAF_ISA_LEVELS "armv8-a"
#else
#define LPAF_MULTIVERSION
#define LPAF_ISA_LEVELS "generic"
#endif
