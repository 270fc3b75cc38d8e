// Smooth MaxSim's d(queries): a block owns a tile of query rows, or a chunk of their gradients, and
// walks the documents as the forward does. The similarities are multiplied again; with the saved maxima they give each
// token's share, which is multiplied with the tokens. Where query tokens are few the documents are split among blocks,
// whose sums FinishRows adds in order. Derivation: docs/maxsim-smooth-and-xtr.md.
#pragma once

#include "forward.cuh"
#include "smooth_maxima.cuh"
#include "smooth_problem.h"
#include "smooth_products.cuh"
#include "smooth_tile_sizes.h"

namespace jmlr::maxsim {

// The tokens of a document with the tiles of this kernel.
template <class Element>
struct SmoothQueryGradientTokens : PlainTokens<Element> {
    static constexpr ForwardTiles tiles_of(int element_size, int dimension, bool) {
        return smooth_query_gradient_tiles(element_size, dimension);
    }
};

template <class Element, int kDimension>
struct SmoothQueryGradient : Forward<Element, kDimension, false, SmoothQueryGradientTokens<Element>> {
    using Stream = Forward<Element, kDimension, false, SmoothQueryGradientTokens<Element>>;
    using Stream::kTiles, Stream::kThreads, Stream::kWalk, Stream::kRowTiles, Stream::kColumnTiles;
    using typename Stream::Document;
    using typename Stream::QueryRows;
    using typename Stream::Row;
    using typename Stream::RowTile;
    using typename Stream::Similarities;
    using typename Stream::Walk;
    static constexpr int kSharedBytes = Stream::kTextScalesAt;
    static_assert(kSharedBytes <= bytes_of(tiles::SharedMemory::small));
    static_assert(kTiles.stages == 2 && kTiles.token_warps == 1 && !kTiles.registers);

    // `chunks` of the stream counts one more where the embedding is walked: the tokens' columns of the block's output.
    struct Params : Stream::Params {
        SmoothBackwardInput in;
        Element* grad_queries;
        float* parts;  // [splits, Nq * Lq, D]: sums for FinishRows; null: rows are finished here
        int outputs;
        float exponent_scale;
        bool pairs;  // two neighbours of a row of the output are aligned
    };

    using Sums = float[kRowTiles][kTiles.chunk / 8][4];

    // What a lane's rows are in one document: a row counts where its maximum is not minus infinity. Which rows these
    // are is computed anew where it matters, once a document, to spare registers.
    struct Rows {
        float maximum[kRowTiles][2], grad[kRowTiles][2];
        bool touched[kRowTiles][2];  // counted in some document
    };

    static JMLR_DEVICE void fill_stage(const Params& p, const RowTile& tile, int output, const Walk& walk, int stage) {
        if (!walk.inside() || walk.empty()) return;
        const Document& d = walk.document;
        bool again = kWalk && walk.ends_tile(p);
        int first = (again ? output : walk.chunk) * kTiles.chunk;
        Stream::text_tile(stage).template fill<kThreads>(
            [&](int i) -> const Element* {
                if (walk.first + i >= d.length) return nullptr;
                return d.text.first + Stream::position_of(d, walk.first + i) * p.problem.document_token_stride + first;
            },
            int(p.problem.dimension) - first, p.whole_documents);
        if (kWalk && !again) Stream::fill_queries(p, tile, Stream::query_tile(stage, 0), walk.chunk);
    }

    static JMLR_DEVICE Row row_of_lane(const Params& p, const RowTile& tile, int first_row, int band, int half) {
        return Stream::row_of(p, tile, first_row + band * 16 + tiles::accumulator_row(2 * half));
    }

    static JMLR_DEVICE void enter_document(const Params& p, const RowTile& tile, int first_row, int64_t document,
                                           Rows& rows) {
        JMLR_UNROLL
        for (int i = 0; i < kRowTiles * 2; ++i) {
            Row row = row_of_lane(p, tile, first_row, i / 2, i % 2);
            float& maximum = rows.maximum[i / 2][i % 2];
            int64_t pair = row.query * p.problem.documents_per_query + document;
            maximum = -tiles::kInfinity;
            if (row.inside) maximum = tiles::load(p.in.maxima + pair * p.problem.query_length + row.token);
            bool counts = maximum != -tiles::kInfinity;
            rows.grad[i / 2][i % 2] = counts ? tiles::load(p.in.grad_scores + pair) : 0.0f;
            rows.touched[i / 2][i % 2] = rows.touched[i / 2][i % 2] || counts;
        }
    }

    // Similarities become shares times the score's gradient. What does not count is selected away.
    static JMLR_DEVICE void to_shares(const Params& p, const Walk& walk, const Rows& rows, Similarities& s) {
        JMLR_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                bool inside = walk.first + n * 8 + tiles::accumulator_column(i) < walk.document.length;
                JMLR_UNROLL
                for (int m = 0; m < kRowTiles; ++m) {
                    float maximum = rows.maximum[m][i / 2];
                    float share = exponential(s[m][n][i], maximum, p.exponent_scale) * rows.grad[m][i / 2];
                    s[m][n][i] = inside && maximum != -tiles::kInfinity ? share : 0.0f;
                }
            }
        }
    }

    static JMLR_DEVICE void run(const Params& p) {
        const Problem& problem = p.problem;
        RowTile tile = Stream::row_tile(p, tiles::block_index() % p.row_tiles);
        int output = int(tiles::block_index() / p.row_tiles % p.outputs);
        int64_t split = tiles::block_index() / p.row_tiles / p.outputs, from = split * p.documents_per_block;
        int64_t to = tiles::smaller(from + p.documents_per_block, problem.documents_per_query);

        int first_row = Stream::first_row();
        bool works = Stream::row_of(p, tile, first_row).inside;  // the other warps only fill tiles
        Rows rows;
        JMLR_UNROLL
        for (int i = 0; i < kRowTiles * 2; ++i) rows.touched[i / 2][i % 2] = false;
        if (!kWalk) Stream::fill_queries(p, tile, Stream::query_tile(0, 0), 0);
        Walk filling(p, tile, from, to), reading = filling;
        fill_stage(p, tile, output, filling, 0);
        tiles::commit_copies();
        filling.advance(p, tile);

        QueryRows no_rows;
        Similarities s;
        Sums sums = {};
        for (int stage = 0; reading.inside(); reading.advance(p, tile), stage ^= 1) {
            tiles::wait_copies<0>();
            tiles::sync_block();  // this stage has arrived, and nobody reads the other one any more
            fill_stage(p, tile, output, filling, stage ^ 1);
            tiles::commit_copies();
            if (filling.inside()) filling.advance(p, tile);
            if (reading.empty() || !works) continue;
            if (reading.chunk == 0) {
                Stream::clear(s);
                if (reading.first == 0) enter_document(p, tile, first_row, reading.number, rows);
            }
            if (!kWalk || !reading.ends_tile(p)) {
                Stream::multiply(s, no_rows, Stream::query_tile(stage, 0), Stream::text_tile(stage));
            }
            if (reading.ends_tile(p)) {
                to_shares(p, reading, rows, s);
                add_shares<Element>(sums, s, Stream::text_tile(stage));
            }
        }
        tiles::wait_copies<0>();
        finish(p, tile, first_row, output, split, rows, sums);
    }

    static JMLR_DEVICE void finish(const Params& p, const RowTile& tile, int first_row, int output, int64_t split,
                                   const Rows& rows, Sums& sums) {
        const Problem& problem = p.problem;
        JMLR_UNROLL
        for (int i = 0; i < kRowTiles * 2; ++i) {
            Row row = row_of_lane(p, tile, first_row, i / 2, i % 2);
            // A row that never counted may have met NaN, times its zeros: zero it stays.
            bool touched = rows.touched[i / 2][i % 2];
            float weight = touched ? query_weight(problem, row.query, row.token) : 0.0f;
            JMLR_UNROLL
            for (int j = 0; j < kTiles.chunk / 4; ++j) {
                float& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
                sum = touched ? sum * weight : 0.0f;
            }
        }
        int first = output * kTiles.chunk, columns = int(problem.dimension);
        auto place = [&](int band, int half) {
            Row row = row_of_lane(p, tile, first_row, band, half);
            return row.inside ? row.query * problem.query_length + row.token : -1;
        };
        if (p.parts != nullptr) {
            float* to = p.parts + split * problem.query_count * problem.query_length * columns;
            store_sums<float>(sums, first, columns, p.pairs, [&](int band, int half) {
                int64_t row = place(band, half);
                return row < 0 ? nullptr : to + row * columns;
            });
        } else {
            store_sums<Element>(sums, first, columns, p.pairs, [&](int band, int half) {
                int64_t row = place(band, half);
                return row < 0 ? nullptr : p.grad_queries + row * columns;
            });
        }
    }
};

}  // namespace jmlr::maxsim
