// The running softmax of a warpgroup's rows (FlashAttention-2, Dao, arXiv 2307.08691), in base 2.
#pragma once

#include "../tiles/fragments.h"
#include "geometry.h"

namespace jmlr::shifted_attention::sm90 {

// Of a thread's two rows: lane / 4 of its warp's 16, and the one eight below. `total` is of the thread's own columns.
struct Softmax {
    float largest[2] = {-tiles::kInfinity, -tiles::kInfinity}, total[2] = {};

    // Scores times `factor`, which is positive, become weights. What was summed up before must be multiplied by
    // `rescale`.
    template <int kColumns>
    JMLR_DEVICE void take(float (&scores)[kColumns][4], float factor, float (&rescale)[2]) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            float top = scores[0][2 * half];
            JMLR_UNROLL
            for (int n = 0; n < kColumns; ++n) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            top = fmaxf(largest[half], tiles::row_maximum(top) * factor);
            // Rows that see no key yet: -inf minus -inf must not appear.
            float reference = top == -tiles::kInfinity ? 0 : top;
            rescale[half] = tiles::exp2_approximate(largest[half] - reference);
            largest[half] = top;
            float sum = 0;
            JMLR_UNROLL
            for (int n = 0; n < kColumns; ++n) {
                JMLR_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[n][i] = tiles::exp2_approximate(scores[n][i] * factor - reference);
                    sum += scores[n][i];
                }
            }
            total[half] = total[half] * rescale[half] + sum;
        }
    }
};

// Scores become -inf where hidden(half, column), of the thread's two rows and the columns from its first on.
template <int kColumns, class Hidden>
JMLR_DEVICE void hide(float (&scores)[kColumns][4], Hidden hidden) {
    JMLR_UNROLL
    for (int n = 0; n < kColumns; ++n) {
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) scores[n][i] = hidden(i / 2, 8 * n + i % 2) ? -tiles::kInfinity : scores[n][i];
    }
}

// The same for the tile of keys from position `key` on, where the queries from `row` on may not attend: later keys, and
// those of groups before. Keys from position `all_start` on are in the group of each of the queries, or later.
template <int kColumns>
JMLR_DEVICE void hide_others(float (&scores)[kColumns][4], const Groups& groups, int row, int own_row, int all_start,
                             int key) {
    int query = row + own_row, first = key + tiles::accumulator_column(0);
    if (key + 8 * kColumns - 1 > row) {
        hide(scores, [&](int half, int column) { return column > query + 8 * half - first; });
    }
    if (key < all_start) {
        int starts[2] = {groups.start(query) - first, groups.start(query + 8) - first};
        hide(scores, [&](int half, int column) { return column < starts[half]; });
    }
}

}  // namespace jmlr::shifted_attention::sm90
