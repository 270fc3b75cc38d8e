// Every tile size of the kernels for compute capability 9.0, in pure functions of the embedding and of how many query
// rows there are. docs/hopper.md says how they were chosen; a tuner overrides them one by one.
#pragma once

#include <cstdint>

namespace jmlr::maxsim::sm90 {

// Query rows that share a document: up to 64, up to 128, more.
enum class Sharing { few, some, many };

// The embedding dimensions that kernels are compiled for; 0: none.
constexpr int forward_dimension(int64_t dimension) {
    return dimension <= 0 ? 0 : dimension <= 64 ? 64 : dimension <= 128 ? 128 : dimension <= 256 ? 256 : 0;
}

struct ForwardTiles {
    int groups;     // warpgroups that multiply
    int row_tiles;  // of 64 query rows, of a warpgroup
    bool in_turns;  // warpgroups hold the same rows and take documents in turns; else each has rows of its own
    int tokens;     // of a document tile
    int box;        // tokens that one copy takes
    int step;       // the last tile of a document is multiplied up to a multiple of this
    int stages;
    bool ordered;  // two warpgroups with rows of their own begin tiles in turns
    bool by_sums;  // winners are found by fused multiply-adds instead of comparisons

    constexpr int rows() const { return row_tiles * 64; }
    constexpr int threads() const { return (groups + 1) * 128; }
};

// Query rows stay in registers, 32 of a thread for 64 rows of 128 columns, and so leave shared memory and its bandwidth
// to the documents. With two row tiles a warpgroup takes the maxima of one while the tensor cores work on the other;
// longer embeddings leave registers for the similarities of 64 tokens. Where few rows share a document its bytes are
// the limit: smaller boxes read less past its end.
constexpr ForwardTiles forward_tiles(int dimension, Sharing sharing) {
    if (sharing == Sharing::many) {
#ifdef JMLR_TUNE_MAXSIM_FORWARD
        if (dimension == JMLR_TUNE_DIMENSION) return {JMLR_TUNE_MAXSIM_FORWARD};
#endif
#include "sm90_tuned_forward.inc"
    }
    int row_tiles = sharing == Sharing::few ? 1 : 2, tokens = dimension == 256 ? 64 : 128;
    int stages = dimension == 64 ? 8 : 6;
    if (sharing == Sharing::many) return {2, row_tiles, false, tokens, 64, 16, stages, true, true};
    return {2, row_tiles, true, tokens, 32, 32, stages, false, true};
}

}  // namespace jmlr::maxsim::sm90
