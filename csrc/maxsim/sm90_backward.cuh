// Both gradients in one launch, and what surrounds it, for one element type.
#pragma once

#include "sm80_backward.cuh"
#include "sm90_backward_plan.h"
#include "sm90_document_gradient.cuh"

namespace jmlr::maxsim::sm90 {

// d(documents) first, whose blocks last longest; those of d(queries) fill what they leave idle.
template <class Element, int kDimension, bool kNormalized>
struct BothGradients {
    using Documents = SortedDocumentGradient<Element, kDimension, kNormalized>;
    using Queries = QueryGradient<Element, kDimension, Documents::kLanes, Documents::kTiles.rows_under_way, true>;
    static constexpr int kThreads = Documents::kThreads;
    static constexpr int kMinBlocks = Documents::kTiles.min_blocks;
    static constexpr int kSharedBytes = Documents::kSharedBytes;

    struct Params {
        typename Documents::Params documents;
        typename Queries::Params queries;
        int64_t document_blocks;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t block = tiles::block_index() - p.document_blocks;
        if (block < 0) Documents::run_block(p.documents, tiles::block_index());
        else Queries::run_warp(p.queries, block * (kThreads / tiles::kWarp) + tiles::warp());
    }
};

template <class Both, class Element>
void launch_both(const Problem& p, const BackwardInput& in, const BackwardOutput& out, const GradientPlan& plan,
                 const int32_t* kept_lengths, float* parts, float* wide, void* stream) {
    using Documents = typename Both::Documents;
    using Queries = typename Both::Queries;
    typename Both::Params params{};
    params.documents = sm80::document_gradient_params<Documents, Element>(p, in, out, plan, kept_lengths, wide);
    params.documents.tile_tokens = plan.tile_tokens;
    params.queries = sm80::query_gradient_params<Queries, Element>(p, in, out, plan, kept_lengths, parts);
    params.document_blocks = sm80::document_gradient_blocks(p, plan);
    int64_t warps = sm80::query_gradient_warps(p, plan);
    tiles::launch<Both>(params, params.document_blocks + divided_up(warps, Both::kThreads / tiles::kWarp), stream);
}

template <class Element, int kDimension>
void launch_gradients(const Problem& p, const BackwardInput& in, const BackwardOutput& out, const GradientPlan& plan,
                      const int32_t* kept_lengths, float* parts, float* wide, void* stream) {
    if (plan.sorted) {
        auto launch = in.document_scales != nullptr ? &launch_both<BothGradients<Element, kDimension, true>, Element>
                                                    : &launch_both<BothGradients<Element, kDimension, false>, Element>;
        return launch(p, in, out, plan, kept_lengths, parts, wide, stream);
    }
    constexpr int kLanes = gradient_lanes(int(sizeof(Element)), kDimension);
    using Queries = QueryGradient<Element, kDimension, kLanes,
                                  BothGradients<Element, kDimension, false>::Documents::kTiles.rows_under_way>;
    sm80::launch_query_gradient<Queries>(
        sm80::query_gradient_params<Queries, Element>(p, in, out, plan, kept_lengths, parts),
        sm80::query_gradient_warps(p, plan), stream);
    sm80::launch_document_gradient<Element, kDimension>(p, in, out, plan, kept_lengths, wide, stream);
}

template <class Element>
void backward_of(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch, int processors,
                 void* stream) {
    constexpr int kBytes = 16;
    bool aligned = p.dimension * int(sizeof(Element)) % kBytes == 0 && sm80::queries_aligned<Element>(p, kBytes) &&
                   sm80::documents_aligned<Element>(p, kBytes) &&
                   sm80::rows_aligned<Element>(out.grad_queries, {}, kBytes) &&
                   sm80::rows_aligned<Element>(out.grad_documents, {}, kBytes);
    GradientPlan plan = gradient_plan(p, in, aligned, processors);
    sm80::backward_around<Element>(
        p, in, out, plan, scratch, stream, [&](const int32_t* kept_lengths, float* parts, float* wide) {
            auto launch = plan.dimension_block == 64 ? &launch_gradients<Element, 64> : &launch_gradients<Element, 128>;
            launch(p, in, out, plan, kept_lengths, parts, wide, stream);
        });
}

}  // namespace jmlr::maxsim::sm90
