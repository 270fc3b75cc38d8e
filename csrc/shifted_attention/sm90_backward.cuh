// What both launches of the backward pass for compute capability 9.0 share. The division of the work and its order are
// those of backward.cuh. A block owns a tile of 64 rows for each of its consuming warpgroups, streams the tiles of the
// other side in a ring of stages, and takes one item of the list after the other.
#pragma once

#include "../tiles/launch.h"
#include "head_rows.h"
#include "sm90_rows.h"
#include "sm90_tiles.h"

namespace jmlr::shifted_attention::sm90 {

using tiles::Barrier;
using tiles::Major;
using tiles::Panels;
using tiles::Ring;
using tiles::TensorMap;

// `q` and `grad_out` have boxes of the queries that a kernel takes at a time, `k` and `v` of its keys, dq, dk and dv of
// a warpgroup's rows.
template <class Element>
struct BackwardParams {
    TensorMap grad_out, q, k, v, dq, dk, dv;
    Layout layout;
    Rows<const Element> out;
    const float* lse;
    float* delta;
    Rows<Element> dq_rows, dk_rows, dv_rows;
    int64_t items;
    int head_dim;
    float scale, scale_log2;
};

// Where lse and delta of a query head's document start.
JMLR_DEVICE int64_t statistics_of(const Layout& layout, const Document& document, int head) {
    return (int64_t(document.batch) * layout.heads + head) * layout.rows + document.first;
}

// Brings a stage, by a warp. Rows that are not the document's meet weights of zero, but zero times NaN is none: where
// the copy may bring such, the warp waits for it and clears them before the consumers hear of the stage.
class Fetcher {
public:
    JMLR_DEVICE explicit Fetcher(int barrier) : landed_(barrier) {}

    // `copy(barrier)` brings `bytes`; `clear()` is called by all lanes.
    template <class Copy, class Clear>
    JMLR_DEVICE void fetch(const Barrier& full, int bytes, Copy copy, bool foreign, Clear clear) {
        const Barrier& target = foreign ? landed_ : full;
        if (tiles::lane() == 0) {
            target.arrive_expecting(bytes);
            copy(target);
        }
        if (!foreign) return;
        landed_.wait(parity_);
        parity_ ^= 1;
        clear();
        tiles::fence_async();
        tiles::sync_warp();
        if (tiles::lane() == 0) full.arrive();
    }

private:
    Barrier landed_;
    int parity_ = 0;
};

// Whether a tile of `rows` rows from `row` on has rows of other documents, or padding. What lies outside of the tensor
// comes as zeros.
JMLR_DEVICE bool has_foreign_rows(const Layout& layout, const Document& document, int row, int rows) {
    return row + rows > document.length && document.first + document.length < layout.rows;
}

// A product of two tiles whose columns are summed over, a[64, :] b[:, :]^T.
template <class Tile, class Other, int kColumns>
JMLR_DEVICE void multiply_rows(float (&c)[kColumns][4], const Tile& a, const Other& b) {
    static_assert(Tile::kRows == 64 && Other::kRows == 8 * kColumns);
    JMLR_UNROLL
    for (int k = 0; k < Tile::kColumns; k += 16) {
        tiles::multiply_async<typename Tile::Element, Major::inner, Major::inner>(c, tiles::inner_matrix(a, 0, k),
                                                                                tiles::inner_matrix(b, 0, k), k > 0);
    }
}

// Accumulators as the operand a of the next product.
template <class Element, int kColumns>
struct Weights {
    uint32_t r[kColumns / 2][4];

    JMLR_DEVICE void take(const float (&c)[kColumns][4]) {
        JMLR_UNROLL
        for (int k = 0; k < kColumns / 2; ++k) {
            auto a = tiles::Fragments<Element>::from_accumulators(&c[2 * k]);
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) r[k][i] = a.r[i];
        }
    }

    // sums += weights rows, with the rows of a tile.
    template <class Tile, int kSums>
    JMLR_DEVICE void multiply(float (&sums)[kSums][4], const Tile& rows) const {
        static_assert(Tile::kRows == 8 * kColumns && Tile::kColumns == 8 * kSums);
        JMLR_UNROLL
        for (int k = 0; k < kColumns / 2; ++k) {
            tiles::multiply_async<Element, Major::outer>(sums, r[k], tiles::outer_matrix(rows, 16 * k, 0), true);
        }
    }
};

}  // namespace jmlr::shifted_attention::sm90
