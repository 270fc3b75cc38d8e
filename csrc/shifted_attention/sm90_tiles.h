// All tuning of the kernels for compute capability 9.0: one pure function of what is known when each is compiled.
#pragma once

#include "../tiles/platform.h"

namespace jmlr::shifted_attention::sm90 {

constexpr int64_t kWidestHead = 256;

// Columns that products over a head take; tiles in shared memory hold whole panels of 64.
constexpr int block_d_of(int64_t head_dim) {
    return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}
constexpr int panels_of(int block_d) { return tiles::ceil_div(block_d, 64) * 64; }

// Registers of a thread after warpgroups have handed them to each other: 512 for all warpgroups together, a producer
// and 2 or 3 consumers.
constexpr int producer_registers(int consumers) { return consumers == 2 ? 40 : 32; }
constexpr int consumer_registers(int consumers) { return consumers == 2 ? 232 : 160; }

struct ForwardTiles {
    int warpgroups;   // consumers, each with 64 queries
    int keys;         // of a tile
    int stages;       // of the rings of k and v
    bool take_turns;  // warpgroups give the tensor cores their work one after the other
    bool own_output;  // the output is staged in memory of its own, so that the next queries come while it is written
    bool pair_heads;  // blocks work in pairs on two heads of a kv head, and share its keys and values
};

// Chosen by arithmetic (docs/hopper.md), not yet timed: 128 queries divide the usual groups, and 128 keys let products
// read less shared memory than they may.
constexpr ForwardTiles forward_tiles(int dimension) {
#ifdef JMLR_TUNE_ATTENTION_FORWARD
    if (dimension == JMLR_TUNE_DIMENSION) return {JMLR_TUNE_ATTENTION_FORWARD};
#endif
#include "sm90_tuned_forward.inc"
    if (dimension <= 64) return {2, 128, 3, true, true, true};
    if (dimension <= 128) return {2, 128, 2, true, true, true};
    return {2, 64, 2, false, false, true};
}

struct BackwardTiles {
    int warpgroups;  // consumers, each with 64 rows of its own
    int streamed;    // rows of the other side that a stage holds
    int stages;
    int buffers;  // of a warpgroup's own rows: with two, the next come while it works
    bool carry;   // the last products of a tile run on while the next one begins, for which registers must suffice
    bool own_in_registers;  // a warpgroup's own rows, which halves what products read from shared memory
};

// The widest head that a warpgroup has the registers for: dk and dv of 64 keys alone take 2 block_d / 2 of a thread's.
constexpr int64_t kWidestBackwardHead = 128;

// The producers need few registers, the consumers all that they can get.
constexpr int kBackwardProducerRegisters = 24;
constexpr int backward_registers(int warpgroups) { return warpgroups == 2 ? 240 : 160; }

// Chosen by arithmetic (docs/hopper.md), not yet timed. Stages of 64 rows fit the ends of groups and the diagonal, and
// leave memory for two buffers.
constexpr BackwardTiles backward_dq_tiles(int dimension) {
#ifdef JMLR_TUNE_ATTENTION_BACKWARD_DQ
    if (dimension == JMLR_TUNE_DIMENSION) return {JMLR_TUNE_ATTENTION_BACKWARD_DQ};
#endif
#include "sm90_tuned_backward_dq.inc"
    return dimension <= 64 ? BackwardTiles{2, 64, 6, 2, true, true} : BackwardTiles{2, 64, 3, 2, true, true};
}

constexpr BackwardTiles backward_dkdv_tiles(int dimension) {
#ifdef JMLR_TUNE_ATTENTION_BACKWARD_DKDV
    if (dimension == JMLR_TUNE_DIMENSION) return {JMLR_TUNE_ATTENTION_BACKWARD_DKDV};
#endif
#include "sm90_tuned_backward_dkdv.inc"
    return dimension <= 64 ? BackwardTiles{2, 64, 6, 2, true, true} : BackwardTiles{2, 64, 3, 2, false, false};
}

}  // namespace jmlr::shifted_attention::sm90
