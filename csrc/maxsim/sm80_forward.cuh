// Launches of the forward pass for one element type.
#pragma once

#include "forward.cuh"
#include "prepare.cuh"
#include "sm80_common.h"

namespace jmlr::maxsim::sm80 {

template <class Element>
void inverse_norms(const TokenList<Element>& tokens, int64_t dimension, bool whole, float* scales, void* stream) {
    using Kernel = InverseNorms<Element>;
    int64_t blocks = divided_up(tokens.count(), Kernel::kThreads / tiles::kWarp);
    tiles::launch<Kernel>({tokens, int(dimension), whole, scales}, blocks, stream);
}

template <class Element>
void all_norms(const Problem& p, const ForwardOutput& out, void* stream) {
    constexpr int kBytes = InverseNorms<Element>::kPerLane * int(sizeof(Element));
    inverse_norms(query_tokens<Element>(p), p.dimension, queries_aligned<Element>(p, kBytes), out.query_scales, stream);
    inverse_norms(document_tokens<Element>(p), p.dimension, documents_aligned<Element>(p, kBytes), out.document_scales,
                  stream);
}

template <class Kernel, class Element>
void launch_forward(const Problem& p, const ForwardOutput& out, const ForwardPlan& plan, void* scratch, void* stream) {
    typename Kernel::Params params{};
    params.problem = p;
    params.out = out;
    params.kept = scratch_array<const int32_t>(scratch, plan.kept);
    params.kept_lengths = scratch_array<const int32_t>(scratch, plan.kept_lengths);
    params.scores = plan.parts < 0 ? out.scores : scratch_array<float>(scratch, plan.parts);
    params.query_length = Divider(p.query_length);
    params.row_tiles = plan.row_tiles;
    params.row_chunks = plan.row_chunks;
    params.queries_per_tile = plan.queries_per_tile;
    params.documents_per_block = plan.documents_per_block;
    params.lanes_per_query = plan.lanes_per_query;
    params.chunks = int(divided_up(p.dimension, Kernel::kTiles.chunk));
    params.whole_queries = queries_aligned<Element>(p, 16);
    params.whole_documents = documents_aligned<Element>(p, 16);
    int64_t runs = divided_up(p.documents_per_query, plan.documents_per_block);
    tiles::launch<Kernel>(params, plan.row_tiles * runs, stream);
}

template <class Element, int kDimension>
void launch_forward(const Problem& p, const ForwardOutput& out, const ForwardPlan& plan, void* scratch, void* stream) {
    if (plan.few_rows) launch_forward<Forward<Element, kDimension, true>, Element>(p, out, plan, scratch, stream);
    else launch_forward<Forward<Element, kDimension, false>, Element>(p, out, plan, scratch, stream);
}

template <class Element>
void forward_of(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    ForwardPlan plan = forward_plan(p, out, processors);
    if (out.normalize) all_norms<Element>(p, out, stream);
    if (plan.row_tiles == 0) {
        if (!out.per_token) zero(out.scores, p.query_count * p.documents_per_query, 4, stream);
        return;
    }
    if (plan.kept >= 0) {
        find_kept_tokens(p, scratch_array<int32_t>(scratch, plan.kept),
                         scratch_array<int32_t>(scratch, plan.kept_lengths), stream);
    }
    switch (plan.dimension_block) {
        case 64:
            launch_forward<Element, 64>(p, out, plan, scratch, stream);
            break;
        case 128:
            launch_forward<Element, 128>(p, out, plan, scratch, stream);
            break;
        case 256:
            launch_forward<Element, 256>(p, out, plan, scratch, stream);
            break;
        default:
            launch_forward<Element, kWalked>(p, out, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        int64_t count = p.query_count * p.documents_per_query;
        sum_parts(scratch_array<const float>(scratch, plan.parts), out.scores, plan.row_chunks, count, stream);
    }
}

}  // namespace jmlr::maxsim::sm80
