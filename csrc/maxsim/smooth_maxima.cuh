// Running smooth maxima of the rows of accumulators: t * log sum exp(s / t), over the tiles of a document's tokens.
//
// As in an online softmax, the sum is kept relative to the maximum so far. The maximum is subtracted before the
// division by t, because the difference of two near numbers is exact. Derivation: docs/maxsim-smooth-and-xtr.md.
#pragma once

#include "../tiles/fragments.h"

namespace jmlr::maxsim {

// exp((s - centre) / t), for scale = 1 / (t ln 2).
JMLR_DEVICE float exponential(float s, float centre, float scale) {
    return tiles::exp2_approximate((s - centre) * scale);
}

// `total` is the sum of exp((s - centre()) / t). A NaN that the maximum drops is in the sum.
struct SmoothMaximum {
    float best, total;

    // Of an infinite maximum, infinity minus infinity would be NaN.
    JMLR_DEVICE float centre() const { return best == tiles::kInfinity || best == -tiles::kInfinity ? 0.0f : best; }
    // log_scale = t ln 2
    JMLR_DEVICE float value(float log_scale) const { return centre() + tiles::log2_accurate(total) * log_scale; }
    JMLR_DEVICE void move_to(float higher, float scale) {
        total *= best == higher ? 1.0f : exponential(best, higher, scale);
        best = higher;
    }
};

JMLR_DEVICE SmoothMaximum sum_of(SmoothMaximum a, SmoothMaximum b, float scale) {
    float higher = tiles::larger(a.best, b.best);
    a.move_to(higher, scale);
    b.move_to(higher, scale);
    return {higher, a.total + b.total};
}

// The sum over the four lanes that share a row, right in the first of them.
JMLR_DEVICE SmoothMaximum row_sum(SmoothMaximum sum, float scale) {
    JMLR_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
        SmoothMaximum other{tiles::shuffle_xor(sum.best, mask), tiles::shuffle_xor(sum.total, mask)};
        sum = sum_of(sum, other, scale);
    }
    return sum;
}

// Takes in one more tile, the lane's part of it.
template <int kRowTiles, int kColumnTiles>
JMLR_DEVICE void absorb(const float (&s)[kRowTiles][kColumnTiles][4], SmoothMaximum (&sums)[kRowTiles][2],
                        float scale) {
    JMLR_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            SmoothMaximum& sum = sums[m][half];
            float higher = sum.best;
            JMLR_UNROLL
            for (int j = 0; j < kColumnTiles * 2; ++j) higher = tiles::larger(higher, s[m][j / 2][2 * half + j % 2]);
            sum.move_to(higher, scale);
            float centre = sum.centre();
            JMLR_UNROLL
            for (int j = 0; j < kColumnTiles * 2; ++j) {
                sum.total += exponential(s[m][j / 2][2 * half + j % 2], centre, scale);
            }
        }
    }
}

}  // namespace jmlr::maxsim
