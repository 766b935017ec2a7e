// lpaf_kernels._native: how the package was built, and host helpers that need no torch.
#include <cstdint>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/keep_threshold.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t end = std::min(text.find(',', begin), text.size());
        parts.push_back(text.substr(begin, end - begin));
        begin = end + 1;
    }
    return parts;
}

py::dict build_info() {
    const std::string cuda_version = LPAF_CUDA_VERSION;
    py::dict info;
    info["version"] = LPAF_VERSION;
    info["compiler"] = LPAF_COMPILER;
    info["cpp_standard"] = static_cast<long>(__cplusplus);
    info["torch_version"] = LPAF_TORCH_VERSION;
    info["torch_stable_abi_floor"] = LPAF_TORCH_FLOOR;
    info["isa_levels"] = split(LPAF_ISA_LEVELS);
    info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::cast(cuda_version);
    info["cuda_archs"] = cuda_version.empty() ? py::object(py::none()) : py::cast(split(LPAF_CUDA_ARCHS));
    return info;
}

std::tuple<float, std::int64_t> keep_threshold(const py::buffer& scores, double keep, int threads) {
    const py::buffer_info info = scores.request();
    if (info.format != py::format_descriptor<float>::format()) {
        throw py::type_error("scores has buffer format '" + info.format + "', expected 'f' (float32)");
    }
    if (!(keep >= 0.0 && keep <= 1.0)) {
        throw py::value_error("keep is " + std::to_string(keep) + ", expected a share in [0, 1]");
    }
    if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + ", expected at least 1");
    py::ssize_t stride = info.itemsize;
    for (py::ssize_t dim = info.ndim; dim-- > 0; stride *= info.shape[static_cast<std::size_t>(dim)]) {
        if (info.size > 0 && info.strides[static_cast<std::size_t>(dim)] != stride) {
            throw py::value_error("scores is not C-contiguous, expected a contiguous buffer");
        }
    }

    const auto parallel_for = [threads](std::int64_t tasks, const auto& task) {
        const auto take_turns = [&task, tasks, threads](std::int64_t first) {
            for (std::int64_t i = first; i < tasks; i += threads) task(i);
        };
        std::vector<std::jthread> workers;
        for (std::int64_t first = 1; first < std::min<std::int64_t>(threads, tasks); ++first) {
            workers.emplace_back(take_turns, first);
        }
        take_turns(0);
    };
    const lpaf::cpu::ScoreSpan<float> span{static_cast<const float*>(info.ptr), nullptr, info.size};
    const py::gil_scoped_release unlocked;
    try {
        const auto threshold = lpaf::cpu::keep_threshold(
            std::span<const lpaf::cpu::ScoreSpan<float>>(&span, 1), false, keep, threads, parallel_for);
        return {threshold.value, threshold.tie_index};
    } catch (const lpaf::cpu::InvalidEntryError&) {
        throw std::invalid_argument("scores holds NaN, expected numbers");
    }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "How lpaf_kernels was built, and host helpers that need no torch.";
    m.def(
        "build_info", &build_info,
        "Return a dict: version, compiler, cpp_standard, torch_version, torch_stable_abi_floor, isa_levels,\n"
        "cuda_version and cuda_archs (both None without CUDA).");
    m.def(
        "keep_threshold", &keep_threshold, py::arg("scores"), py::arg("keep"), py::kw_only(),
        py::arg("threads") = 1,
        "Return (value, tie_index) that keep floor(keep * n + 0.5) of the n scores, exactly.\n\n"
        "scores is a C-contiguous buffer of float32. An entry is kept if score > value, or score == value\n"
        "and its flat index < tie_index. Raises ValueError for NaN, a share outside [0, 1] or threads < 1,\n"
        "and TypeError for other buffer types.");
}
