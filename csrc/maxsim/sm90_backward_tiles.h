// Every choice of the backward kernels for compute capability 9.0, in pure functions of the element and the embedding.
// The reasons: docs/maxsim-backward.md.
#pragma once

#include <cstdint>

#include "tile_sizes.h"

namespace jmlr::maxsim::sm90 {

// One kernel makes both gradients: `min_blocks` of `warps` warps, whose groups of lanes have `rows_under_way` rows
// under way at a time. A block of d(documents) sorts the winners of up to `rows` query tokens by up to `tokens` tokens
// of a document; `gradients`: queries of which it keeps d(score).
struct BackwardTiles {
    int warps, rows_under_way, min_blocks;
    int tokens, rows, gradients;

    constexpr int threads() const { return warps * 32; }
};

// Lanes that share a row of an embedding, 16 bytes each.
constexpr int gradient_lanes(int element_size, int dimension) {
    int lanes = dimension * element_size / 16;
    return lanes < 32 ? lanes : 32;
}

constexpr BackwardTiles backward_tiles(int element_size, int dimension, bool normalized) {
    (void)element_size, (void)dimension;
    if (!normalized) {
#ifdef JMLR_TUNE_MAXSIM_BACKWARD
        if (dimension == JMLR_TUNE_DIMENSION) return {JMLR_TUNE_MAXSIM_BACKWARD};
#endif
#include "sm90_tuned_backward.inc"
    }
    return {16, 4, normalized ? 1 : 2, 512, 16384, 2048};
}

}  // namespace jmlr::maxsim::sm90
