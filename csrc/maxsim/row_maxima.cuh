// Running maxima of the rows of accumulators, and where they are.
#pragma once

#include "../tiles/fragments.h"

namespace jmlr::maxsim {

// A maximum and the lowest position that attains it; NaN is above everything.
struct Maximum {
    float value;
    int position;
};

JMLR_DEVICE Maximum larger_of(const Maximum& a, const Maximum& b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    bool tie = a_nan ? b_nan : a.value == b.value;
    bool take_b = tie ? b.position < a.position : !a_nan && (b_nan || b.value > a.value);
    return take_b ? b : a;
}

// The maximum over the four lanes that share a row.
JMLR_DEVICE Maximum row_maximum(Maximum best) {
    JMLR_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
        Maximum other{tiles::shuffle_xor(best.value, mask), tiles::shuffle_xor(best.position, mask)};
        best = larger_of(best, other);
    }
    return best;
}

// The lane's maximum of each row after one more tile, whose column 0 is token `first`. With kTrack its position too.
template <bool kTrack, int kRowTiles, int kColumnTiles>
JMLR_DEVICE void absorb(const float (&s)[kRowTiles][kColumnTiles][4], Maximum (&maxima)[kRowTiles][2], int first) {
    JMLR_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            float highest = s[m][0][2 * half];
            JMLR_UNROLL
            for (int j = 1; j < kColumnTiles * 2; ++j) {
                highest = tiles::maximum_or_nan(highest, s[m][j / 2][2 * half + j % 2]);
            }
            Maximum& best = maxima[m][half];
            if (kTrack) {
                int column = 0;  // the lowest that holds the maximum, less the lane's own part
                JMLR_UNROLL
                for (int j = kColumnTiles * 2 - 1; j >= 0; --j) {
                    if (s[m][j / 2][2 * half + j % 2] == highest) column = j / 2 * 8 + j % 2;
                }
                if (highest != highest) {
                    JMLR_UNROLL
                    for (int j = kColumnTiles * 2 - 1; j >= 0; --j) {
                        float x = s[m][j / 2][2 * half + j % 2];
                        if (x != x) column = j / 2 * 8 + j % 2;
                    }
                }
                bool better = best.value == best.value && !(highest <= best.value);
                if (better) best.position = first + column + tiles::accumulator_column(0);
            }
            best.value = tiles::maximum_or_nan(best.value, highest);
        }
    }
}

}  // namespace jmlr::maxsim
