// Packs of entries. No torch, no CUDA.
#pragma once

namespace lpaf::cuda {

// kWidth consecutive entries, moved by as few memory instructions as the type allows.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
    T entries[kWidth];
};

}  // namespace lpaf::cuda
