// Launches of the forward pass for one element type.
#pragma once

#include "forward.cuh"
#include "plan.h"
#include "prepare.cuh"

namespace jmlr::maxsim::sm80 {

inline bool multiples(int64_t unit, std::initializer_list<int64_t> strides) {
    for (int64_t stride : strides) {
        if (stride % unit != 0) return false;
    }
    return true;
}

// Whether every row starts at a multiple of `bytes`.
template <class Element>
bool rows_aligned(const void* first, std::initializer_list<int64_t> strides, int bytes) {
    return reinterpret_cast<uintptr_t>(first) % uintptr_t(bytes) == 0 && multiples(bytes / int(sizeof(Element)), strides);
}

template <class Element>
bool queries_aligned(const Problem& p, int bytes) {
    return rows_aligned<Element>(p.queries, {p.query_stride, p.query_token_stride}, bytes);
}

template <class Element>
bool documents_aligned(const Problem& p, int bytes) {
    return rows_aligned<Element>(p.documents, {p.document_query_stride, p.document_stride, p.document_token_stride}, bytes);
}

template <class T>
T* scratch_array(void* scratch, int64_t at) {
    return at < 0 ? nullptr : reinterpret_cast<T*>(static_cast<char*>(scratch) + at);
}

inline void find_kept_tokens(const Problem& p, int32_t* kept, int32_t* lengths, void* stream) {
    constexpr int kPerBlock = KeptTokens::kThreads / tiles::kWarp;
    tiles::launch<KeptTokens>({p, p.document_count(), kept, lengths}, divided_up(p.document_count(), kPerBlock), 0, stream);
}

template <class Element>
void norms(const Problem& p, const ForwardOutput& out, void* stream) {
    using Kernel = InverseNorms<Element>;
    constexpr int kPerBlock = Kernel::kThreads / tiles::kWarp, kBytes = Kernel::kPerLane * int(sizeof(Element));
    typename Kernel::Params queries{static_cast<const Element*>(p.queries), 1, p.query_count, p.query_length, 0,
                                    p.query_stride, p.query_token_stride, int(p.dimension),
                                    queries_aligned<Element>(p, kBytes), out.query_scales};
    tiles::launch<Kernel>(queries, divided_up(p.query_count * p.query_length, kPerBlock), 0, stream);
    bool packed = p.packed();
    typename Kernel::Params documents{static_cast<const Element*>(p.documents),
                                      packed || !p.candidates ? 1 : p.query_count,
                                      packed ? 1 : p.documents_per_query,
                                      packed ? p.packed_tokens : p.document_length,
                                      p.document_query_stride, p.document_stride, p.document_token_stride,
                                      int(p.dimension), documents_aligned<Element>(p, kBytes), out.document_scales};
    tiles::launch<Kernel>(documents, divided_up(document_tokens(p), kPerBlock), 0, stream);
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
    tiles::launch<Kernel>(params, plan.row_tiles * runs, Kernel::kSharedBytes, stream);
}

template <class Element, int kDimension>
void launch_forward(const Problem& p, const ForwardOutput& out, const ForwardPlan& plan, void* scratch, void* stream) {
    if (plan.few_rows) launch_forward<Forward<Element, kDimension, true>, Element>(p, out, plan, scratch, stream);
    else launch_forward<Forward<Element, kDimension, false>, Element>(p, out, plan, scratch, stream);
}

template <class Element>
void forward_of(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    ForwardPlan plan = forward_plan(p, out, processors);
    if (out.query_scales != nullptr) norms<Element>(p, out, stream);
    if (plan.row_tiles == 0) return;
    if (plan.kept >= 0) {
        find_kept_tokens(p, scratch_array<int32_t>(scratch, plan.kept), scratch_array<int32_t>(scratch, plan.kept_lengths),
                         stream);
    }
    switch (plan.dimension_block) {
        case 64: launch_forward<Element, 64>(p, out, plan, scratch, stream); break;
        case 128: launch_forward<Element, 128>(p, out, plan, scratch, stream); break;
        case 256: launch_forward<Element, 256>(p, out, plan, scratch, stream); break;
        default: launch_forward<Element, kWalked>(p, out, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        int64_t count = p.query_count * p.documents_per_query;
        tiles::launch<SumParts>({scratch_array<const float>(scratch, plan.parts), out.scores, plan.row_chunks, count},
                                divided_up(count, SumParts::kThreads), 0, stream);
    }
}

}  // namespace jmlr::maxsim::sm80
