// Smooth MaxSim's d(documents): a block owns a tile of a document's tokens, or a chunk of their gradients, and walks
// all query tokens that meet the document. Similarities have tokens as rows, so that no accumulator must be transposed
// before it is multiplied with the query rows. Derivation: docs/maxsim-smooth-and-xtr.md.
#pragma once

#include "smooth_maxima.cuh"
#include "smooth_problem.h"
#include "smooth_products.cuh"
#include "smooth_tile_sizes.h"

namespace jmlr::maxsim {

template <class Element, int kDimension>
struct SmoothDocumentGradient {
    static constexpr SmoothDocumentTiles kTiles = smooth_document_gradient_tiles(int(sizeof(Element)), kDimension);
    static constexpr int kThreads = kTiles.threads();
    static constexpr int kMinBlocks = kTiles.min_blocks;
    static constexpr int kTokens = kTiles.tokens;
    static constexpr int kRows = kTiles.rows;
    static constexpr bool kWalk = kDimension == kWalked;
    static_assert(kTokens == 2 * tiles::kWarp && kRows <= kThreads);

    using F = TransposedFragments<Element>;
    using TextTile = tiles::SharedTile<Element, kTokens, kTiles.chunk>;
    using QueryTile = tiles::SharedTile<Element, kRows, kTiles.chunk>;
    using Similarities = float[1][kRows / 8][4];
    using Sums = float[1][kTiles.chunk / 8][4];

    struct Params {
        Problem problem;
        SmoothBackwardInput in;
        Element* grad_documents;
        Divider query_length;
        int64_t token_tiles;  // blocks that share a document; each takes every token_tiles-th tile
        int outputs;          // chunks of a gradient, each with a block of its own
        int chunks;           // steps of a row tile: of the embedding, and one more where that is walked
        float exponent_scale;
        bool whole_queries, whole_documents;  // rows start at multiples of 16 bytes
        bool pairs;                           // two neighbours of a row of the output are aligned
    };

    // Shared memory, in bytes. Statistics of row tile n lie in buffer n % 3: those of the tile that is being read, of
    // the one that is being filled, of the next.
    static constexpr int kBuffers = 3;
    static constexpr int kStagesAt = kWalk ? 0 : TextTile::kBytes;
    static constexpr int kStageBytes = QueryTile::kBytes + (kWalk ? TextTile::kBytes : 0);
    static constexpr int kMaximaAt = kStagesAt + 2 * kStageBytes;        // [buffers][rows]
    static constexpr int kFactorsAt = kMaximaAt + kBuffers * kRows * 4;  // the same: gradient times weight
    static constexpr int kSharedBytes = kFactorsAt + kBuffers * kRows * 4;
    static_assert(kSharedBytes <= bytes_of(tiles::SharedMemory::small));

    static JMLR_DEVICE QueryTile query_tile(int stage) { return QueryTile(kStagesAt + stage * kStageBytes); }
    static JMLR_DEVICE TextTile text_tile(int stage) {
        return TextTile(kWalk ? kStagesAt + stage * kStageBytes + QueryTile::kBytes : 0);
    }
    static JMLR_DEVICE tiles::Shared<float> maxima(int row_tile) {
        return tiles::shared_memory<float>(kMaximaAt) + row_tile % kBuffers * kRows;
    }
    static JMLR_DEVICE tiles::Shared<float> factors(int row_tile) {
        return tiles::shared_memory<float>(kFactorsAt) + row_tile % kBuffers * kRows;
    }

    // What a block works on.
    struct Tile {
        int64_t first_query;  // the first that meets the document
        int64_t document;     // among the documents of a query
        Text<Element> text;
        int output;
        int row_count;  // query tokens that meet the document
        int first_token;
        uint64_t kept;  // a bit for each token
    };

    // Of a query token; -inf: it does not count.
    struct Statistics {
        float maximum, factor;
    };

    // Where the walk stands: a step is one chunk of one tile of query rows.
    struct Walk {
        int row_tile, chunk;

        JMLR_DEVICE bool inside(const Tile& tile) const { return row_tile * kRows < tile.row_count; }
        JMLR_DEVICE bool ends_tile(const Params& p) const { return chunk == p.chunks - 1; }
        JMLR_DEVICE void advance(const Params& p) {
            bool ends = ends_tile(p);
            chunk = ends ? 0 : chunk + 1;
            row_tile += ends;
        }
    };

    static JMLR_DEVICE uint64_t kept_tokens(const Params& p, const Tile& tile) {
        uint64_t kept = 0;
        JMLR_UNROLL
        for (int half = 1; half >= 0; --half) {
            int position = tile.first_token + half * tiles::kWarp + tiles::lane();
            bool counts = position < tile.text.length;
            if (counts && p.problem.document_mask != nullptr) {
                const uint8_t* mask = document_mask_of(p.problem, tile.first_query, tile.document, tile.text.place);
                counts = tiles::load(mask + position * p.problem.document_mask_token_stride) != 0;
            }
            kept = kept << tiles::kWarp | tiles::ballot(counts);
        }
        return kept;
    }

    static JMLR_DEVICE Statistics load_statistics(const Params& p, const Tile& tile, int row_tile) {
        Statistics found{-tiles::kInfinity, 0.0f};
        int row = row_tile * kRows + tiles::thread_index();
        if (tiles::thread_index() >= kRows || row >= tile.row_count) return found;
        int segment = p.query_length.divide(row), token = row - segment * p.query_length.divisor();
        int64_t query = tile.first_query + segment, pair = query * p.problem.documents_per_query + tile.document;
        found.maximum = tiles::load(p.in.maxima + pair * p.problem.query_length + token);
        if (found.maximum != -tiles::kInfinity) {
            found.factor = tiles::load(p.in.grad_scores + pair) * query_weight(p.problem, query, token);
        }
        return found;
    }

    static JMLR_DEVICE void write_statistics(int row_tile, const Statistics& statistics) {
        if (tiles::thread_index() >= kRows) return;
        maxima(row_tile).write(tiles::thread_index(), statistics.maximum);
        factors(row_tile).write(tiles::thread_index(), statistics.factor);
    }

    static JMLR_DEVICE void fill_text(const Params& p, const Tile& tile, int stage, int chunk) {
        int first = chunk * kTiles.chunk;
        text_tile(stage).template fill<kThreads>(
            [&](int i) -> const Element* {
                if ((tile.kept >> i & 1) == 0) return nullptr;
                return tile.text.first + (tile.first_token + i) * p.problem.document_token_stride + first;
            },
            int(p.problem.dimension) - first, p.whole_documents);
    }

    // Rows that do not count are zeros, so that their NaN stays out of the products.
    static JMLR_DEVICE void fill_stage(const Params& p, const Tile& tile, const Walk& walk, int stage) {
        if (!walk.inside(tile)) return;
        bool again = kWalk && walk.ends_tile(p);
        int first = (again ? tile.output : walk.chunk) * kTiles.chunk;
        query_tile(stage).template fill<kThreads>(
            [&](int i) -> const Element* {
                if (maxima(walk.row_tile).read(i) == -tiles::kInfinity) return nullptr;
                int row = walk.row_tile * kRows + i, query = p.query_length.divide(row);
                int token = row - query * p.query_length.divisor();
                return query_row<Element>(p.problem, tile.first_query + query, token) + first;
            },
            int(p.problem.dimension) - first, p.whole_queries);
        if (kWalk && !again) fill_text(p, tile, stage, walk.chunk);
    }

    // Similarities become shares times gradients. What does not count is selected away.
    static JMLR_DEVICE void to_shares(const Params& p, int row_tile, const bool (&kept)[2], Similarities& s) {
        JMLR_UNROLL
        for (int n = 0; n < kRows / 8; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                int row = n * 8 + tiles::accumulator_column(i);
                float maximum = maxima(row_tile).read(row);
                float share = exponential(s[0][n][i], maximum, p.exponent_scale) * factors(row_tile).read(row);
                s[0][n][i] = kept[i / 2] && maximum != -tiles::kInfinity ? share : 0.0f;
            }
        }
    }

    static JMLR_DEVICE void walk_rows(const Params& p, const Tile& tile, const bool (&kept)[2], Sums& sums) {
        int first_row = tiles::warp() * 16;
        bool works = (tile.kept >> first_row & 0xffff) != 0;  // the other warps only fill tiles
        tiles::sync_block();                                  // nobody reads what the tile before has left
        for (int row_tile = 0; row_tile < 2; ++row_tile) write_statistics(row_tile, load_statistics(p, tile, row_tile));
        tiles::sync_block();
        if (!kWalk) fill_text(p, tile, 0, 0);
        Walk filling{0, 0}, reading{0, 0};
        fill_stage(p, tile, filling, 0);
        tiles::commit_copies();
        filling.advance(p);

        Similarities s;
        Statistics next{};
        for (int stage = 0; reading.inside(tile); reading.advance(p), stage ^= 1) {
            tiles::wait_copies<0>();
            tiles::sync_block();  // this stage has arrived, and nobody reads the other one any more
            fill_stage(p, tile, filling, stage ^ 1);
            tiles::commit_copies();
            filling.advance(p);
            if (reading.ends_tile(p)) next = load_statistics(p, tile, reading.row_tile + 2);
            if (works) {
                if (reading.chunk == 0) {
                    JMLR_UNROLL
                    for (int i = 0; i < kRows / 2; ++i) s[0][i / 4][i % 4] = 0.0f;
                }
                if (!kWalk || !reading.ends_tile(p)) {
                    tiles::multiply_bands<F, kTiles.chunk, kTiles.depths_unrolled>(
                        s, [&](int, int k) { return F::load_a(text_tile(stage), first_row, k); },
                        [&](int n, int k) { return F::load_b(query_tile(stage), n, k); });
                }
                if (reading.ends_tile(p)) {
                    to_shares(p, reading.row_tile, kept, s);
                    add_shares<Element>(sums, s, query_tile(stage));
                }
            }
            if (reading.ends_tile(p)) write_statistics(reading.row_tile + 2, next);
        }
        tiles::wait_copies<0>();
    }

    static JMLR_DEVICE void take_tile(const Params& p, const Tile& tile) {
        int first_row = tiles::warp() * 16 + tiles::accumulator_row(0);
        bool kept[2] = {(tile.kept >> first_row & 1) != 0, (tile.kept >> (first_row + 8) & 1) != 0};
        Sums sums = {};
        if (tile.kept != 0) walk_rows(p, tile, kept, sums);
        JMLR_UNROLL
        for (int i = 0; i < kTiles.chunk / 2; ++i) {  // an excluded token may have met NaN, times its zeros
            float& sum = sums[0][i / 4][i % 4];
            sum = kept[i % 4 / 2] ? sum : 0.0f;
        }
        int columns = int(p.problem.dimension);
        store_sums<Element>(sums, tile.output * kTiles.chunk, columns, p.pairs, [&](int, int half) -> Element* {
            int position = tile.first_token + first_row + half * 8;
            if (position >= tile.text.length) return nullptr;
            return p.grad_documents + (tile.text.place + position) * columns;
        });
    }

    static JMLR_DEVICE void run(const Params& p) {
        const Problem& problem = p.problem;
        Tile tile{};
        tile.output = int(tiles::block_index() % p.outputs);
        int64_t number = tiles::block_index() / p.outputs / p.token_tiles;
        tile.first_query = problem.candidates ? number / problem.documents_per_query : 0;
        tile.document = number - tile.first_query * problem.documents_per_query;
        tile.text = text_of<Element>(problem, tile.first_query, tile.document);
        tile.row_count = int(problem.query_length * (problem.candidates ? 1 : problem.query_count));
        int64_t first = tiles::block_index() / p.outputs % p.token_tiles * kTokens;
        for (; first < tile.text.length; first += p.token_tiles * kTokens) {
            tile.first_token = int(first);
            tile.kept = kept_tokens(p, tile);
            take_tile(p, tile);
        }
    }
};

}  // namespace jmlr::maxsim
