// How a MaxSim problem is laid out over the kernels for compute capability 9.0: host arithmetic, nothing else.
#pragma once

#include "../tiles/tensor_map.h"
#include "plan.h"
#include "sm90_prepare.cuh"
#include "sm90_tiles.h"

namespace jmlr::maxsim::sm90 {

struct ForwardPlan : RowLayout {
    int dimension_block = 0;
    Sharing sharing = Sharing::many;
    int64_t tiles_per_list = 0;  // row tiles that share documents
    int64_t sets_per_list = 0, sets = 0;
    int64_t blocks = 0;
    int lanes_per_query = 1;
    // Byte offsets of scratch arrays, -1 where there is none.
    int64_t bits = -1, extents = -1, parts = -1;
    int64_t scratch_bytes = 0;
};

inline Sharing sharing_of(const Problem& p) {
    int64_t rows = p.query_length * (p.candidates ? 1 : p.query_count);
    return rows <= 64 ? Sharing::few : rows <= 128 ? Sharing::some : Sharing::many;
}

inline ForwardPlan plan_forward(const Problem& p, const ForwardOutput& out, int processors) {
    check_sizes(p);
    ForwardPlan plan;
    plan.dimension_block = forward_dimension(p.dimension);
    plan.sharing = sharing_of(p);
    ForwardTiles sizes = forward_tiles(plan.dimension_block, plan.sharing);
    static_cast<RowLayout&>(plan) = row_layout(p, sizes.rows());
    plan.tiles_per_list = p.candidates ? plan.row_chunks : plan.row_tiles;
    plan.sets_per_list = divided_up(plan.tiles_per_list, sizes.in_turns ? 1 : sizes.groups);
    plan.sets = plan.sets_per_list * (p.candidates ? p.query_count : 1);
    plan.blocks = tiles::smaller<int64_t>(plan.sets * p.documents_per_query, processors);
    plan.lanes_per_query = lanes_per_query(p.query_length);
    Scratch scratch;
    if (p.document_mask != nullptr) {
        plan.bits = scratch.add(bits_count(p) * 4);
        plan.extents = scratch.add(p.document_count() * int64_t(sizeof(Extent)));
    }
    if (plan.row_chunks > 1 && !out.per_token) {
        plan.parts = scratch.add(plan.row_chunks * p.query_count * p.documents_per_query * 4);
    }
    plan.scratch_bytes = scratch.bytes();
    return plan;
}

// Documents as copies of boxes see them.
inline tiles::Axes document_axes(const Problem& p, int box) {
    if (p.packed()) return {2, {p.dimension, p.packed_tokens}, {1, p.document_token_stride}, {64, box}};
    if (!p.candidates) {
        return {3,
                {p.dimension, p.document_length, p.documents_per_query},
                {1, p.document_token_stride, p.document_stride},
                {64, box, 1}};
    }
    return {4,
            {p.dimension, p.document_length, p.documents_per_query, p.query_count},
            {1, p.document_token_stride, p.document_stride, p.document_query_stride},
            {64, box, 1, 1}};
}

}  // namespace jmlr::maxsim::sm90
