// What every binding of a CUDA kernel needs: the current stream, and an error in place of a failed launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Weak: a torch built without CUDA does not have it, and this library may be built against such a torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace lpaf::cuda {

inline cudaStream_t current_stream(const char* op, int32_t device_index) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
        throw std::runtime_error(std::string(op) + ": this torch was built without CUDA");
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
    }
}

}  // namespace lpaf::cuda
