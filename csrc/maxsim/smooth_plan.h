// How the smooth backward is laid out over blocks, and the scratch memory that this takes. Its forward has the plan of
// the hard maximum's (plan.h).
#pragma once

#include "plan.h"
#include "smooth_problem.h"
#include "smooth_tile_sizes.h"

namespace jmlr::maxsim {

struct SmoothBackwardPlan : RowLayout {
    int dimension_block = 0, outputs = 0;         // chunks of a gradient, each with a block of its own
    int64_t splits = 1, documents_per_block = 0;  // of d(queries)
    int64_t token_tiles = 0;                      // blocks that share a document
    // Byte offsets of scratch arrays, -1 where there is none.
    int64_t kept = -1, kept_lengths = -1, parts = -1;
    int64_t scratch_bytes = 0;
};

inline SmoothBackwardPlan smooth_backward_plan(const Problem& p, int processors) {
    check_sizes(p);
    SmoothBackwardPlan plan;
    int64_t rows = p.query_count * p.query_length, documents = p.documents_per_query;
    if (rows == 0 || documents == 0) return plan;
    plan.dimension_block = smooth_gradient_dimension(p.dimension);
    plan.outputs = int(divided_up(p.dimension, smooth_gradient_chunk(element_size(p.type), plan.dimension_block)));
    ForwardTiles tiles = smooth_query_gradient_tiles(element_size(p.type), plan.dimension_block);
    static_cast<RowLayout&>(plan) = row_layout(p, tiles.rows());
    // Blocks enough for two waves: every split writes float32 sums of all rows, so there are few.
    constexpr int64_t kMostSplits = 16;
    int64_t wanted = divided_up(int64_t(processors) * tiles.min_blocks, plan.row_tiles * plan.outputs);
    for (int64_t most : {kMostSplits, documents}) wanted = wanted < most ? wanted : most;
    plan.documents_per_block = divided_up(documents, wanted);
    plan.splits = divided_up(documents, plan.documents_per_block);
    int tokens = smooth_document_gradient_tiles(element_size(p.type), plan.dimension_block).tokens;
    plan.token_tiles = divided_up(p.document_length, tokens);
    if (p.packed()) {  // the lengths lie on the device: a document of mean length shall have blocks enough
        plan.token_tiles = divided_up(2 * p.packed_tokens, p.document_count() * tokens);
    }
    Scratch scratch;
    if (p.document_mask != nullptr) {
        plan.kept = scratch.add(document_token_count(p) * 4);
        plan.kept_lengths = scratch.add(p.document_count() * 4);
    }
    if (plan.splits > 1) plan.parts = scratch.add(plan.splits * rows * p.dimension * 4);
    plan.scratch_bytes = scratch.bytes();
    return plan;
}

}  // namespace jmlr::maxsim
