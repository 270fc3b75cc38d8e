// Launches of the backward pass for one element type.
#pragma once

#include "document_gradient.cuh"
#include "query_gradient.cuh"
#include "sm80_common.h"

namespace jmlr::maxsim::sm80 {

template <class Kernel, class Element>
typename Kernel::Params query_gradient_params(const Problem& p, const BackwardInput& in, const BackwardOutput& out,
                                              const BackwardPlan& plan, const int32_t* kept_lengths, float* parts) {
    constexpr int kBytes = Kernel::kPerLane * int(sizeof(Element));
    typename Kernel::Params params{};
    params.problem = p;
    params.in = in;
    params.kept_lengths = kept_lengths;
    params.grad_queries = static_cast<Element*>(out.grad_queries);
    params.grad_weights = out.grad_weights;
    params.parts = parts;
    params.query_length = Divider(p.query_length);
    params.chunks = plan.chunks;
    params.splits = plan.splits;
    params.documents_per_split = plan.documents_per_split;
    bool fills = p.dimension % Kernel::kPerLane == 0;
    params.whole = fills && documents_aligned<Element>(p, kBytes);
    params.whole_queries =
        fills && queries_aligned<Element>(p, kBytes) && rows_aligned<Element>(out.grad_queries, {}, kBytes);
    return params;
}

// One for each query token, chunk of the embedding and part of the documents.
inline int64_t query_gradient_warps(const Problem& p, const BackwardPlan& plan) {
    return p.query_count * p.query_length * plan.chunks * plan.splits;
}

template <class Kernel>
void launch_query_gradient(const typename Kernel::Params& params, int64_t warps, void* stream) {
    tiles::launch<Kernel>(params, divided_up(warps, Kernel::kThreads / tiles::kWarp), stream);
}

template <class Kernel, class Element>
typename Kernel::Params document_gradient_params(const Problem& p, const BackwardInput& in, const BackwardOutput& out,
                                                 const BackwardPlan& plan, const int32_t* kept_lengths, float* wide) {
    constexpr int kBytes = Kernel::kPerLane * int(sizeof(Element));
    typename Kernel::Params params{};
    params.problem = p;
    params.in = in;
    params.kept_lengths = kept_lengths;
    params.grad_documents = static_cast<Element*>(out.grad_documents);
    params.wide = wide;
    params.query_length = Divider(p.query_length);
    params.token_tiles = plan.token_tiles;
    params.chunks = plan.chunks;
    bool fills = p.dimension % Kernel::kPerLane == 0;
    params.whole_queries = fills && queries_aligned<Element>(p, kBytes);
    params.whole =
        fills && documents_aligned<Element>(p, kBytes) && rows_aligned<Element>(out.grad_documents, {}, kBytes);
    return params;
}

inline int64_t document_gradient_blocks(const Problem& p, const BackwardPlan& plan) {
    return p.document_count() * plan.token_tiles * plan.chunks;
}

template <class Element, int kDimension>
void launch_document_gradient(const Problem& p, const BackwardInput& in, const BackwardOutput& out,
                              const BackwardPlan& plan, const int32_t* kept_lengths, float* wide, void* stream) {
    using Kernel = DocumentGradient<Element, kDimension>;
    tiles::launch<Kernel>(document_gradient_params<Kernel, Element>(p, in, out, plan, kept_lengths, wide),
                          document_gradient_blocks(p, plan), stream);
}

template <class Element>
void finish_rows(typename FinishRows<Element>::Params params, bool aligned, void* stream) {
    using Kernel = FinishRows<Element>;
    constexpr int kBytes = Kernel::kPerLane * int(sizeof(Element));
    params.whole = aligned && params.dimension % Kernel::kPerLane == 0 && rows_aligned<Element>(params.out, {}, kBytes);
    int64_t blocks = divided_up(params.tokens.count(), Kernel::kThreads / tiles::kWarp);
    tiles::launch<Kernel>(params, blocks, stream);
}

template <class Element>
void zero_gradients(const Problem& p, const BackwardOutput& out, void* stream) {
    int64_t rows = p.query_count * p.query_length;
    zero(out.grad_queries, rows * p.dimension, int(sizeof(Element)), stream);
    zero(out.grad_documents, document_token_count(p) * p.dimension, int(sizeof(Element)), stream);
    if (out.grad_weights != nullptr) zero(out.grad_weights, rows, 4, stream);
}

// All of the backward pass but the two kernels themselves, which `launch(kept_lengths, parts, wide)` starts.
template <class Element, class Launch>
void backward_around(const Problem& p, const BackwardInput& in, const BackwardOutput& out, const BackwardPlan& plan,
                     void* scratch, void* stream, Launch launch) {
    if (p.query_count * p.query_length == 0 || p.documents_per_query == 0)
        return zero_gradients<Element>(p, out, stream);
    constexpr int kBytes = FinishRows<Element>::kPerLane * int(sizeof(Element));
    int dimension = int(p.dimension);
    int32_t* kept_lengths = scratch_array<int32_t>(scratch, plan.kept_lengths);
    float* parts = scratch_array<float>(scratch, plan.parts);
    float* wide = scratch_array<float>(scratch, plan.wide);
    if (kept_lengths != nullptr) find_kept_tokens(p, nullptr, kept_lengths, stream);
    launch(kept_lengths, parts, wide);
    if (parts != nullptr) {
        finish_rows<Element>(
            {parts, plan.splits, query_tokens<Element>(p), dimension, false, p.query_weights, p.query_weights_stride,
             p.query_weights_token_stride, in.query_scales, static_cast<Element*>(out.grad_queries), out.grad_weights},
            queries_aligned<Element>(p, kBytes), stream);
    }
    Element* grad_documents = static_cast<Element*>(out.grad_documents);
    if (p.packed() && wide != nullptr) zero_uncovered(p, wide, 4, stream);
    if (p.packed() && wide == nullptr) zero_uncovered(p, grad_documents, int(sizeof(Element)), stream);
    if (wide != nullptr) {
        finish_rows<Element>({wide, 1, document_tokens<Element>(p), dimension, false, nullptr, 0, 0, in.document_scales,
                              grad_documents, nullptr},
                             documents_aligned<Element>(p, kBytes), stream);
    }
}

template <class Element, int kDimension>
void launch_gradients(const Problem& p, const BackwardInput& in, const BackwardOutput& out, const BackwardPlan& plan,
                      const int32_t* kept_lengths, float* parts, float* wide, void* stream) {
    using Queries = QueryGradient<Element, kDimension>;
    launch_query_gradient<Queries>(query_gradient_params<Queries, Element>(p, in, out, plan, kept_lengths, parts),
                                   query_gradient_warps(p, plan), stream);
    launch_document_gradient<Element, kDimension>(p, in, out, plan, kept_lengths, wide, stream);
}

template <class Element>
void backward_of(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch, int processors,
                 void* stream) {
    BackwardPlan plan = backward_plan(p, in, processors);
    backward_around<Element>(
        p, in, out, plan, scratch, stream, [&](const int32_t* kept_lengths, float* parts, float* wide) {
            auto launch = plan.dimension_block == 64 ? &launch_gradients<Element, 64> : &launch_gradients<Element, 128>;
            launch(p, in, out, plan, kept_lengths, parts, wide, stream);
        });
}

// Launches of kernels that other architectures' backward passes share: compiled once, for all chips, where the type's
// sm80_*.cu says JMLR_SHARED_LAUNCHES(, Element), and only named elsewhere (`extern`). The same kernel compiled in two
// files, of which one is for a single chip, would be one name for two programs.
#define JMLR_SHARED_LAUNCHES(kind, Element)                                                               \
    kind template void finish_rows<Element>(FinishRows<Element>::Params, bool, void*);                    \
    kind template void launch_document_gradient<Element, 64>(const Problem&, const BackwardInput&,        \
                                                             const BackwardOutput&, const BackwardPlan&,  \
                                                             const int32_t*, float*, void*);              \
    kind template void launch_document_gradient<Element, 128>(const Problem&, const BackwardInput&,       \
                                                              const BackwardOutput&, const BackwardPlan&, \
                                                              const int32_t*, float*, void*);

}  // namespace jmlr::maxsim::sm80
