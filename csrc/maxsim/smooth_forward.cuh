// Smooth MaxSim forward: the tiles and the walk of the hard maximum's forward, with a sum of exponentials in place of
// a maximum. Of the tile that crosses a document's end, the places past it are minus infinity.
#pragma once

#include "forward.cuh"
#include "smooth_maxima.cuh"

namespace jmlr::maxsim {

template <class Element, int kDimension, bool kFewRows>
struct SmoothForward : Forward<Element, kDimension, kFewRows> {
    using Base = Forward<Element, kDimension, kFewRows>;
    using Base::kTiles, Base::kRows, Base::kRowTiles, Base::kColumnTiles, Base::first_row, Base::first_token;
    using typename Base::Document;
    using typename Base::Row;
    using typename Base::RowTile;
    using typename Base::Similarities;
    using typename Base::Walk;

    struct Params : Base::Params {
        float* maxima;  // [Nq, N, Lq]; null: not asked for
        float exponent_scale, log_scale;
    };

    struct Maxima {
        SmoothMaximum of[kRowTiles][2];

        JMLR_DEVICE void clear() {
            JMLR_UNROLL
            for (int i = 0; i < kRowTiles * 2; ++i) of[i / 2][i % 2] = {-tiles::kInfinity, 0.0f};
        }
    };

    // The shared memory of the hard maximum, with sums in place of positions.
    static JMLR_DEVICE tiles::Shared<float> bests() { return tiles::shared_memory<float>(Base::kMaximaAt); }
    static JMLR_DEVICE tiles::Shared<float> totals() { return tiles::shared_memory<float>(Base::kPlacesAt); }

    static JMLR_DEVICE void absorb_tile(const Params& p, const Walk& walk, int, Similarities& s, Maxima& maxima) {
        int inside = walk.document.length - walk.first - first_token();
        if (inside < kTiles.tokens_per_warp()) {
            JMLR_UNROLL
            for (int n = 0; n < kColumnTiles; ++n) {
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) {
                    bool counts = n * 8 + tiles::accumulator_column(i) < inside;
                    JMLR_UNROLL
                    for (int m = 0; m < kRowTiles; ++m) s[m][n][i] = counts ? s[m][n][i] : -tiles::kInfinity;
                }
            }
        }
        absorb(s, maxima.of, p.exponent_scale);
    }

    static JMLR_DEVICE void publish(const Params& p, const Maxima& maxima, int parity) {
        int base = (parity * kTiles.token_warps + tiles::warp() % kTiles.token_warps) * kRows + first_row();
        JMLR_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                SmoothMaximum sum = row_sum(maxima.of[m][half], p.exponent_scale);
                if (tiles::lane() % 4 == 0) {
                    int row = base + m * 16 + tiles::accumulator_row(2 * half);
                    bests().write(row, sum.best);
                    totals().write(row, sum.total);
                }
            }
        }
    }

    static JMLR_DEVICE float smooth_maximum_of(const Params& p, int row, int parity) {
        int place = parity * kTiles.token_warps * kRows + row;
        SmoothMaximum sum{bests().read(place), totals().read(place)};
        JMLR_UNROLL
        for (int i = 1; i < kTiles.token_warps; ++i) {
            place += kRows;
            sum = sum_of(sum, {bests().read(place), totals().read(place)}, p.exponent_scale);
        }
        return sum.value(p.log_scale);
    }

    static JMLR_DEVICE void finish_document(const Params& p, const RowTile& tile, const Row& own, int64_t number,
                                            const Document& d, int parity) {
        int i = tiles::thread_index();
        bool empty = d.length == 0;
        if (p.maxima != nullptr && i < kRows && own.inside) {
            bool counts = !empty && tiles::shared_memory<int>(Base::kRowCountsAt).read(i) != 0;
            int64_t pair = own.query * p.problem.documents_per_query + number;
            tiles::store(p.maxima + pair * p.problem.query_length + own.token,
                         counts ? smooth_maximum_of(p, i, parity) : -tiles::kInfinity);
        }
        Base::store_scores(p, tile, number, !empty, 0.0f,
                           [&](int row) { return Base::share_of(row, smooth_maximum_of(p, row, parity)); });
    }

    static JMLR_DEVICE void run(const Params& p) { Base::template stream<SmoothForward>(p); }
};

}  // namespace jmlr::maxsim
