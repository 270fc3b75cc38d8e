// Backward pass, without atomics: every gradient tile has one block that owns it, and every sum one order. The first
// launch (backward_dq.cuh) owns tiles of queries, the second (backward_dkdv.cuh) tiles of keys. Both compute the
// weights again from q, k and lse. The derivation is docs/shifted-attention-backward.md.
#pragma once

#include "../tiles/bands.h"
#include "../tiles/launch.h"
#include "head_rows.h"
#include "tile_sizes.h"

namespace jmlr::shifted_attention {

template <class Element>
struct BackwardParams {
    Layout layout;
    Rows<const Element> grad_out, q, k, v, out;
    const float* lse;
    float* delta;
    Rows<Element> dq, dk, dv;
    int head_dim;
    float scale, scale_log2;
};

// Where lse and delta of a query head's document start.
JMLR_DEVICE int64_t statistics_of(const Layout& layout, const Document& document, int head) {
    return (int64_t(document.batch) * layout.heads + head) * layout.rows + document.first;
}

}  // namespace jmlr::shifted_attention
