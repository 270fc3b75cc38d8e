// Smooth MaxSim's d(weights), a sum over documents of the score's gradient times the maximum. A block owns 32 tokens of
// a query; its warps share the documents, and their sums are added in order.
#pragma once

#include "../tiles/launch.h"

namespace jmlr::maxsim {

struct SmoothWeightGradient {
    static constexpr int kWarps = 8;
    static constexpr int kThreads = kWarps * tiles::kWarp;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * int(sizeof(float));

    struct Params {
        const float* grad_scores;
        const float* maxima;
        float* grad_weights;
        int64_t query_length, documents;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t parts = tiles::ceil_div(p.query_length, int64_t(tiles::kWarp));
        int64_t query = tiles::block_index() / parts, first = tiles::block_index() % parts * tiles::kWarp;
        int64_t token = first + tiles::lane();
        int warp = tiles::warp();
        float sum = 0.0f;
        for (int64_t document = warp; token < p.query_length && document < p.documents; document += kWarps) {
            int64_t pair = query * p.documents + document;
            float maximum = tiles::load(p.maxima + pair * p.query_length + token);
            if (maximum != -tiles::kInfinity) sum += tiles::load(p.grad_scores + pair) * maximum;
        }
        tiles::Shared<float> sums = tiles::shared_memory<float>(0);
        sums.write(tiles::thread_index(), sum);
        tiles::sync_block();
        if (warp != 0 || token >= p.query_length) return;
        for (int other = 1; other < kWarps; ++other) sum += sums.read(other * tiles::kWarp + tiles::lane());
        tiles::store(p.grad_weights + query * p.query_length + token, sum);
    }
};

}  // namespace jmlr::maxsim
