// Products of a warp that owns several bands of 16 rows: a fragment of b, once loaded, serves all of them.
#pragma once

#include "fragments.h"

namespace tiles {

// c[band][n / 8] += a[band, k] b[k, n], summed over k < kDepth. load_a(band, k) gives an A, load_b(n, k) a BPair.
template <class Fragments, int kDepth, int kUnroll = 64, int kBands, int kColumns, class LoadA, class LoadB>
JMLR_DEVICE void multiply_bands(float (&c)[kBands][kColumns][4], LoadA load_a, LoadB load_b) {
    static_assert(kDepth % Fragments::kDepth == 0 && kColumns % 2 == 0);
    JMLR_UNROLL_BY(kUnroll)
    for (int k = 0; k < kDepth; k += Fragments::kDepth) {
        typename Fragments::A a[kBands];
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) a[band] = load_a(band, k);
        JMLR_UNROLL
        for (int n = 0; n < kColumns; n += 2) {
            typename Fragments::BPair b = load_b(n * 8, k);
            JMLR_UNROLL
            for (int band = 0; band < kBands; ++band) {
                Fragments::multiply(c[band][n], a[band], b.b[0]);
                Fragments::multiply(c[band][n + 1], a[band], b.b[1]);
            }
        }
    }
}

// Accumulators into a tile, from a row and a column on; neighbours in one access.
template <class Tile, int kBands, int kColumns>
JMLR_DEVICE void write_bands(const Tile& tile, int row, int column, const float (&c)[kBands][kColumns][4]) {
    JMLR_UNROLL
    for (int band = 0; band < kBands; ++band) {
        JMLR_UNROLL
        for (int n = 0; n < kColumns; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; i += 2) {
                tile.write_pair(row + 16 * band + accumulator_row(i), column + 8 * n + accumulator_column(i),
                                c[band][n][i], c[band][n][i + 1]);
            }
        }
    }
}

}  // namespace tiles
