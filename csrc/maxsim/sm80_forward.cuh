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

// What every kernel takes that owns query rows.
template <class Kernel, class Element, class Plan>
typename Kernel::Params stream_params(const Problem& p, const Plan& plan, void* scratch) {
    typename Kernel::Params params{};
    params.problem = p;
    params.kept = scratch_array<const int32_t>(scratch, plan.kept);
    params.kept_lengths = scratch_array<const int32_t>(scratch, plan.kept_lengths);
    params.query_length = Divider(p.query_length);
    params.row_tiles = plan.row_tiles;
    params.row_chunks = plan.row_chunks;
    params.queries_per_tile = plan.queries_per_tile;
    params.documents_per_block = plan.documents_per_block;
    params.chunks = int(divided_up(p.dimension, Kernel::kTiles.chunk));
    params.whole_queries = queries_aligned<Element>(p, 16);
    params.whole_documents = documents_aligned<typename Kernel::Stored>(p, 16);
    return params;
}

template <class Kernel, class Element>
void launch_forward(const Problem& p, const ForwardOutput& out, const typename Kernel::TokenParams& tokens,
                    const ForwardPlan& plan, void* scratch, void* stream) {
    auto params = stream_params<Kernel, Element>(p, plan, scratch);
    params.out = out;
    params.tokens = tokens;
    params.scores = plan.parts < 0 ? out.scores : scratch_array<float>(scratch, plan.parts);
    params.lanes_per_query = plan.lanes_per_query;
    int64_t runs = divided_up(p.documents_per_query, plan.documents_per_block);
    tiles::launch<Kernel>(params, plan.row_tiles * runs, stream);
}

template <class Element, class Tokens, int kDimension>
void launch_forward(const Problem& p, const ForwardOutput& out, const typename Tokens::Params& tokens,
                    const ForwardPlan& plan, void* scratch, void* stream) {
    using Many = Forward<Element, kDimension, false, Tokens>;
    using Few = Forward<Element, kDimension, true, Tokens>;
    if (plan.few_rows) launch_forward<Few, Element>(p, out, tokens, plan, scratch, stream);
    else launch_forward<Many, Element>(p, out, tokens, plan, scratch, stream);
}

// Scores, maxima and winners; inverse norms are there already.
template <class Element, class Tokens>
void score(const Problem& p, const ForwardOutput& out, const typename Tokens::Params& tokens, void* scratch,
           int processors, void* stream) {
    ForwardPlan plan = forward_plan(p, out, processors, Tokens::tiles_of);
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
            launch_forward<Element, Tokens, 64>(p, out, tokens, plan, scratch, stream);
            break;
        case 128:
            launch_forward<Element, Tokens, 128>(p, out, tokens, plan, scratch, stream);
            break;
        case 256:
            launch_forward<Element, Tokens, 256>(p, out, tokens, plan, scratch, stream);
            break;
        default:
            launch_forward<Element, Tokens, kWalked>(p, out, tokens, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        int64_t count = p.query_count * p.documents_per_query;
        sum_parts(scratch_array<const float>(scratch, plan.parts), out.scores, plan.row_chunks, count, stream);
    }
}

template <class Element>
void forward_of(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    if (out.normalize) all_norms<Element>(p, out, stream);
    score<Element, PlainTokens<Element>>(p, out, {}, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm80
