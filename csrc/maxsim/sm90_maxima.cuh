// The maxima of a warpgroup's accumulators: what follows each product, while the next ones run.
#pragma once

#include "row_maxima.cuh"

namespace jmlr::maxsim::sm90 {

// Similarities of excluded tokens become -inf; bit i % 32 of kept[i / 32] stands for column i.
template <int kColumnTiles>
JMLR_DEVICE void exclude(float (&s)[kColumnTiles][4], const uint32_t (&kept)[4]) {
    JMLR_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
        uint32_t bits = kept[n / 4] >> tiles::accumulator_column(0);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) {
            if ((bits >> (n % 4 * 8 + i % 2) & 1) == 0) s[n][i] = -tiles::kInfinity;
        }
    }
}

// The lane's maximum of each row after one more tile, whose column 0 is token `first`; with `track` its position too,
// which stays where no similarity is above -inf. `whole`: every token is kept.
template <int kColumnTiles>
JMLR_DEVICE void absorb_tile(float (&s)[kColumnTiles][4], Maximum (&maxima)[2], const uint32_t (&kept)[4], bool whole,
                             int first, bool track) {
    auto& tile = reinterpret_cast<const float (&)[1][kColumnTiles][4]>(s);
    auto& best = reinterpret_cast<Maximum(&)[1][2]>(maxima);
    if (!whole) exclude(s, kept);
    if (track) absorb<true>(tile, best, first);
    else absorb<false>(tile, best, first);
}

}  // namespace jmlr::maxsim::sm90
