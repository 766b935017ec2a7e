// The GPU's keep_threshold on the host: every block of every launch, one after the other, in a drawn order.
#include "cuda/keep_threshold.cuh"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace {

using namespace lpaf::cuda::radix_select;

class HostLauncher {
  public:
    explicit HostLauncher(std::uint64_t seed) : random_(seed) {}

    template <class Program>
    void run(std::int64_t blocks, const typename Program::Arguments& arguments) {
        const std::vector<int> threads = shuffled(Program::kThreads);
        const auto each = [&threads](const auto& phase) {
            for (const int thread : threads) phase(thread);
        };
        for (const int block : shuffled(static_cast<int>(blocks))) {
            typename Program::Shared shared;
            std::memset(&shared, 0xA5, sizeof(shared));
            Program(arguments, shared, block).run(each);
        }
    }

  private:
    std::vector<int> shuffled(int count) {
        std::vector<int> order(static_cast<std::size_t>(count));
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        return order;
    }

    std::mt19937_64 random_;
};

template <class Format, bool kWeighted>
void select(const std::vector<ScoreSpan>& spans, double keep, bool across, int enough_blocks,
            std::uint64_t seed, void* value, std::int64_t* tie_index) {
    const KeepThreshold<Format, kWeighted> threshold(spans, keep, across, enough_blocks);
    std::vector<std::uint64_t> workspace(threshold.workspace_bytes() / sizeof(std::uint64_t) + 1,
                                         0xA5A5A5A5A5A5A5A5u);
    HostLauncher launcher(seed);
    threshold.run(workspace.data(), static_cast<typename Format::Value*>(value), tie_index, launcher);
}

}  // namespace

// format: 0 float32, 1 float64, 2 float16, 3 bfloat16. weights is null or holds a pointer per tensor.
extern "C" void keep_threshold_grid(int format, std::int64_t count, const void* const* scores,
                                    const std::int64_t* const* weights, const std::int64_t* sizes,
                                    double keep, bool across, int enough_blocks, std::uint64_t seed,
                                    void* value, std::int64_t* tie_index) {
    std::vector<ScoreSpan> spans;
    for (std::int64_t i = 0; i < count; ++i) {
        spans.push_back({scores[i], weights == nullptr ? nullptr : weights[i], sizes[i]});
    }
    constexpr decltype(&select<Float32, false>) kSelect[4][2] = {
        {select<Float32, false>, select<Float32, true>},
        {select<Float64, false>, select<Float64, true>},
        {select<Float16, false>, select<Float16, true>},
        {select<BFloat16, false>, select<BFloat16, true>},
    };
    kSelect[format][weights != nullptr](spans, keep, across, enough_blocks, seed, value, tie_index);
}
