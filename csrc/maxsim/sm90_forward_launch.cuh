// Launches of the forward pass on compute capability 9.0 for one element type.
#pragma once

#include "sm80_common.h"
#include "sm90.h"
#include "sm90_forward.cuh"
#include "sm90_plan.h"

namespace jmlr::maxsim::sm90 {

template <class Kernel, class Element>
void launch_forward(const Problem& p, const ForwardOutput& out, const ForwardPlan& plan, void* scratch, void* stream) {
    typename Kernel::Params params{};
    params.documents =
        tiles::tensor_map(static_cast<const Element*>(p.documents), document_axes(p, Kernel::kTiles.box));
    params.problem = p;
    params.out = out;
    params.bits = sm80::scratch_array<const uint32_t>(scratch, plan.bits);
    params.extents = sm80::scratch_array<const Extent>(scratch, plan.extents);
    params.scores = plan.parts < 0 ? out.scores : sm80::scratch_array<float>(scratch, plan.parts);
    params.query_length = Divider(p.query_length);
    params.row_chunks = plan.row_chunks;
    params.queries_per_tile = plan.queries_per_tile;
    params.tiles_per_list = int(plan.tiles_per_list);
    params.sets_per_list = int(plan.sets_per_list);
    params.sets = plan.sets;
    params.lanes_per_query = plan.lanes_per_query;
    params.whole_queries = sm80::queries_aligned<Element>(p, 4);
    tiles::launch<Kernel>(params, plan.blocks, stream);
}

template <class Element, int kDimension>
void launch_forward(const Problem& p, const ForwardOutput& out, const ForwardPlan& plan, void* scratch, void* stream) {
    using Few = Forward<Element, kDimension, Sharing::few>;
    using Some = Forward<Element, kDimension, Sharing::some>;
    using Many = Forward<Element, kDimension, Sharing::many>;
    if (plan.sharing == Sharing::few) launch_forward<Few, Element>(p, out, plan, scratch, stream);
    else if (plan.sharing == Sharing::some) launch_forward<Some, Element>(p, out, plan, scratch, stream);
    else launch_forward<Many, Element>(p, out, plan, scratch, stream);
}

template <class Element>
void forward_of(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    ForwardPlan plan = plan_forward(p, out, processors);
    if (plan.bits >= 0) {
        constexpr int kPerBlock = MaskBits::kThreads / tiles::kWarp;
        MaskBits::Params params{p, p.document_count(), sm80::scratch_array<uint32_t>(scratch, plan.bits),
                                sm80::scratch_array<Extent>(scratch, plan.extents)};
        tiles::launch<MaskBits>(params, divided_up(p.document_count(), kPerBlock), stream);
    }
    switch (plan.dimension_block) {
        case 64:
            launch_forward<Element, 64>(p, out, plan, scratch, stream);
            break;
        case 128:
            launch_forward<Element, 128>(p, out, plan, scratch, stream);
            break;
        default:
            launch_forward<Element, 256>(p, out, plan, scratch, stream);
    }
    if (plan.parts >= 0) {
        sm80::sum_parts(sm80::scratch_array<const float>(scratch, plan.parts), out.scores, plan.row_chunks,
                        p.query_count * p.documents_per_query, stream);
    }
}

}  // namespace jmlr::maxsim::sm90
