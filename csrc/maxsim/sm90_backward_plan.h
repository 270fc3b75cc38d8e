// How the backward pass is laid out over blocks at compute capability 9.0: host arithmetic, nothing else.
#pragma once

#include "plan.h"
#include "sm90_backward_tiles.h"

namespace jmlr::maxsim::sm90 {

struct GradientPlan : BackwardPlan {
    // Whether the query tokens that meet a document fit one list, and their gradients, and rows are aligned; then
    // token_tiles are tiles of tile_tokens.
    bool sorted = false;
    int tile_tokens = 0;
};

// Into how many tiles documents are cut. Each looks at all of its document's winners and gathers its own part, and
// blocks run in waves. Clock cycles, calculated, of a block that shares its multiprocessor with another.
inline int64_t gradient_token_tiles(int64_t blocks, int64_t rows, int64_t length, int most_tokens, int64_t slots) {
    constexpr int64_t kBlock = 3000, kRow = 20, kLooksPerCycle = 2, kFewestTokens = 16;
    int64_t best = divided_up(length, most_tokens), shortest = INT64_MAX;
    for (int64_t count = best; count <= divided_up(length, kFewestTokens); ++count) {
        int64_t block = kBlock + rows / kLooksPerCycle + kRow * (rows + length) / count;
        int64_t time = divided_up(blocks * count, slots) * block;
        if (time < shortest) {
            shortest = time;
            best = count;
        }
    }
    return best;
}

// `aligned`: rows of inputs and gradients start at multiples of 16 bytes and end there. Scratch memory is the same
// without.
inline GradientPlan gradient_plan(const Problem& p, const BackwardInput& in, bool aligned, int processors) {
    GradientPlan plan;
    static_cast<BackwardPlan&>(plan) = backward_plan(p, in, processors);
    BackwardTiles tiles = backward_tiles(element_size(p.type), plan.dimension_block, in.document_scales != nullptr);
    int64_t queries = p.candidates ? 1 : p.query_count, rows = queries * p.query_length;
    plan.sorted = aligned && rows <= tiles.rows && (in.rule.rule == Rule::tokens || queries <= tiles.gradients);
    if (!plan.sorted || plan.token_tiles == 0) return plan;
    // Of packed documents the lengths lie on the device: one of twice the mean length shall have blocks enough.
    int64_t length = p.packed() ? divided_up(2 * p.packed_tokens, p.document_count()) : p.document_length;
    int64_t slots = int64_t(processors) * tiles.min_blocks;
    plan.token_tiles = gradient_token_tiles(p.document_count() * plan.chunks, rows, length, tiles.tokens, slots);
    plan.tile_tokens = int(divided_up(length, plan.token_tiles));
    return plan;
}

}  // namespace jmlr::maxsim::sm90
