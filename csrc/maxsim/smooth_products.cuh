// The products of the smooth backward: similarities once more, and shares of the gradient times rows.
#pragma once

#include "../tiles/bands.h"
#include "rows.cuh"

namespace jmlr::maxsim {

// Similarities with document tokens as rows. They must equal the forward's to the last bit, because a share is
// exp((similarity - maximum) / t) whatever the temperature: of the three products of floats, the tensor cores see the
// two small ones in the forward's order.
template <class Element>
struct TransposedFragments : tiles::Fragments<Element> {};

template <>
struct TransposedFragments<float> : tiles::Fragments<float> {
    static JMLR_DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
        float product[4] = {};
        tiles::multiply_add<tiles::Tf32>(product, a.finite, b.low);
        tiles::multiply_add<tiles::Tf32>(product, a.low, b.finite);
        tiles::multiply_add<tiles::Tf32>(product, a.high, b.high);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) c[i] += product[i];
    }
};

// Shares times gradients, rounded once, and rows in their own type.
template <class Element>
struct ShareFragments : tiles::Fragments<Element> {};

// Of float16 rows the shares are tf32, whose mantissa is as long: a share times a small gradient would underflow.
template <>
struct ShareFragments<tiles::Half> {
    using Rows = tiles::Fragments<tiles::Half>;
    static constexpr int kDepth = Rows::kDepth;

    struct A {
        uint32_t r[2][4];  // columns 0 to 7, 8 to 15
    };
    using B = Rows::B;
    using BPair = Rows::BPair;

    template <class Tile>
    static JMLR_DEVICE BPair load_b_transposed(const Tile& tile, int n, int k) {
        return Rows::load_b_transposed(tile, n, k);
    }

    // Slot t of k stands for k = 2t and slot t + 4 for 2t + 1, as in Fragments<float>: two neighbours are one register
    // of float16.
    static JMLR_DEVICE A from_accumulators(const float (*c)[4]) {
        A a;
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            a.r[half][0] = tiles::to_tf32(c[half][0]);
            a.r[half][1] = tiles::to_tf32(c[half][2]);
            a.r[half][2] = tiles::to_tf32(c[half][1]);
            a.r[half][3] = tiles::to_tf32(c[half][3]);
        }
        return a;
    }

    static JMLR_DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            uint32_t rows[2] = {tiles::bit_cast<uint32_t>(tiles::to_float(tiles::Half{uint16_t(b.r[half])})),
                                tiles::bit_cast<uint32_t>(tiles::to_float(tiles::Half{uint16_t(b.r[half] >> 16)}))};
            tiles::multiply_add<tiles::Tf32>(c, a.r[half], rows);
        }
    }
};

// c[band] += shares[band] rows, for a tile [k, n] of rows.
template <class Element, int kBands, int kDepths, int kColumns, class Tile>
JMLR_DEVICE void add_shares(float (&c)[kBands][kColumns][4], const float (&shares)[kBands][kDepths][4],
                            const Tile& rows) {
    using Products = ShareFragments<Element>;
    tiles::multiply_bands<Products, kDepths * 8>(
        c, [&](int band, int k) { return Products::from_accumulators(&shares[band][k / 8]); },
        [&](int n, int k) { return Products::load_b_transposed(rows, n, k); });
}

// A warp's accumulators to rows in global memory from column `first` on: `row(band, half)` is a lane's row, null for
// none, and columns from `columns` on are not stored. `pairs`: two neighbours of a row are aligned.
template <class Out, int kBands, int kColumns, class RowPointer>
JMLR_DEVICE void store_sums(const float (&c)[kBands][kColumns][4], int first, int columns, bool pairs,
                            RowPointer row_pointer) {
    JMLR_UNROLL
    for (int band = 0; band < kBands; ++band) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            Out* row = row_pointer(band, half);
            if (row == nullptr) continue;
            JMLR_UNROLL
            for (int n = 0; n < kColumns; ++n) {
                Slice<2> slice{{c[band][n][2 * half], c[band][n][2 * half + 1]}};
                store_slice(row, first + n * 8 + tiles::accumulator_column(0), columns, pairs, slice);
            }
        }
    }
}

}  // namespace jmlr::maxsim
