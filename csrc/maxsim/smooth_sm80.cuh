// Launches of smooth MaxSim for one element type.
#pragma once

#include "sm80_backward.cuh"
#include "sm80_forward.cuh"
#include "smooth_document_gradient.cuh"
#include "smooth_forward.cuh"
#include "smooth_plan.h"
#include "smooth_query_gradient.cuh"
#include "smooth_sm80.h"

namespace jmlr::maxsim::sm80 {

// Powers and logarithms of two are what the hardware has.
inline float exponent_scale(float temperature) { return float(1.0 / (double(temperature) * 0.6931471805599453)); }
inline float log_scale(float temperature) { return float(double(temperature) * 0.6931471805599453); }

template <class Plan>
void find_kept_tokens_of(const Problem& p, const Plan& plan, void* scratch, void* stream) {
    if (plan.kept < 0) return;
    find_kept_tokens(p, scratch_array<int32_t>(scratch, plan.kept), scratch_array<int32_t>(scratch, plan.kept_lengths),
                     stream);
}

template <class Kernel, class Element>
void launch_smooth_forward(const Problem& p, const SmoothForwardOutput& out, const ForwardPlan& plan, void* scratch,
                           void* stream) {
    auto params = stream_params<Kernel, Element>(p, plan, scratch);
    params.scores = plan.parts < 0 ? out.scores : scratch_array<float>(scratch, plan.parts);
    params.lanes_per_query = plan.lanes_per_query;
    params.maxima = out.maxima;
    params.exponent_scale = exponent_scale(out.temperature);
    params.log_scale = log_scale(out.temperature);
    int64_t runs = divided_up(p.documents_per_query, plan.documents_per_block);
    tiles::launch<Kernel>(params, plan.row_tiles * runs, stream);
}

template <class Element, int kDimension>
void launch_smooth_forward(const Problem& p, const SmoothForwardOutput& out, const ForwardPlan& plan, void* scratch,
                           void* stream) {
    using Many = SmoothForward<Element, kDimension, false>;
    using Few = SmoothForward<Element, kDimension, true>;
    if (plan.few_rows) launch_smooth_forward<Few, Element>(p, out, plan, scratch, stream);
    else launch_smooth_forward<Many, Element>(p, out, plan, scratch, stream);
}

template <class Element>
void smooth_forward_of(const Problem& p, const SmoothForwardOutput& out, void* scratch, int processors, void* stream) {
    ForwardPlan plan = forward_plan(p, {}, processors, forward_tiles);
    int64_t pairs = p.query_count * p.documents_per_query;
    if (plan.row_tiles == 0) return zero(out.scores, pairs, 4, stream);
    find_kept_tokens_of(p, plan, scratch, stream);
    switch (plan.dimension_block) {
        case 64:
            launch_smooth_forward<Element, 64>(p, out, plan, scratch, stream);
            break;
        case 128:
            launch_smooth_forward<Element, 128>(p, out, plan, scratch, stream);
            break;
        case 256:
            launch_smooth_forward<Element, 256>(p, out, plan, scratch, stream);
            break;
        default:
            launch_smooth_forward<Element, kWalked>(p, out, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        sum_parts(scratch_array<const float>(scratch, plan.parts), out.scores, plan.row_chunks, pairs, stream);
    }
}

template <class Element, int kDimension>
void launch_smooth_query_gradient(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out,
                                  const SmoothBackwardPlan& plan, void* scratch, void* stream) {
    using Kernel = SmoothQueryGradient<Element, kDimension>;
    auto params = stream_params<Kernel, Element>(p, plan, scratch);
    params.chunks += Kernel::kWalk;
    params.in = in;
    params.grad_queries = static_cast<Element*>(out.grad_queries);
    params.parts = scratch_array<float>(scratch, plan.parts);
    params.outputs = plan.outputs;
    params.exponent_scale = exponent_scale(in.temperature);
    params.pairs =
        p.dimension % 2 == 0 && (plan.parts >= 0 || rows_aligned<Element>(out.grad_queries, {}, 2 * sizeof(Element)));
    tiles::launch<Kernel>(params, plan.row_tiles * plan.outputs * plan.splits, stream);
}

template <class Element, int kDimension>
void launch_smooth_document_gradient(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out,
                                     const SmoothBackwardPlan& plan, void* stream) {
    using Kernel = SmoothDocumentGradient<Element, kDimension>;
    typename Kernel::Params params{};
    params.problem = p;
    params.in = in;
    params.grad_documents = static_cast<Element*>(out.grad_documents);
    params.query_length = Divider(p.query_length);
    params.token_tiles = plan.token_tiles;
    params.outputs = plan.outputs;
    params.chunks = plan.outputs + Kernel::kWalk;
    params.exponent_scale = exponent_scale(in.temperature);
    params.whole_queries = queries_aligned<Element>(p, 16);
    params.whole_documents = documents_aligned<Element>(p, 16);
    params.pairs = p.dimension % 2 == 0 && rows_aligned<Element>(out.grad_documents, {}, 2 * sizeof(Element));
    tiles::launch<Kernel>(params, p.document_count() * plan.token_tiles * plan.outputs, stream);
}

template <class Element, int kDimension>
void launch_smooth_gradients(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out,
                             const SmoothBackwardPlan& plan, void* scratch, void* stream) {
    launch_smooth_query_gradient<Element, kDimension>(p, in, out, plan, scratch, stream);
    launch_smooth_document_gradient<Element, kDimension>(p, in, out, plan, stream);
}

template <class Element>
void smooth_backward_of(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out, void* scratch,
                        int processors, void* stream) {
    SmoothBackwardPlan plan = smooth_backward_plan(p, processors);
    if (plan.row_tiles == 0) return zero_gradients<Element>(p, out, stream);
    find_kept_tokens_of(p, plan, scratch, stream);
    switch (plan.dimension_block) {
        case 64:
            launch_smooth_gradients<Element, 64>(p, in, out, plan, scratch, stream);
            break;
        case 128:
            launch_smooth_gradients<Element, 128>(p, in, out, plan, scratch, stream);
            break;
        default:
            launch_smooth_gradients<Element, kWalked>(p, in, out, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        finish_rows<Element>(
            {scratch_array<const float>(scratch, plan.parts), plan.splits, query_tokens<Element>(p), int(p.dimension),
             false, nullptr, 0, 0, nullptr, static_cast<Element*>(out.grad_queries), nullptr},
            true, stream);
    }
    if (p.packed()) zero_uncovered(p, out.grad_documents, int(sizeof(Element)), stream);
    if (out.grad_weights != nullptr) weight_gradient(p, in, out.grad_weights, stream);
}

}  // namespace jmlr::maxsim::sm80
