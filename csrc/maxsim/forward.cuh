// MaxSim forward: a block holds up to 128 query rows and streams documents past them.
//
// Several queries share a tile of rows: rows never mix, since the maximum is per row and the sum over a query's rows
// comes after. Queries longer than a tile are cut into row tiles whose partial sums are added afterwards, in order
// (SumParts).
//
// Nothing is masked. Places past a document's end repeat its last token, which is never the lowest of equals; a mask
// has become a list of kept tokens (KeptTokens) by which they are fetched. So the work on each similarity, beside its
// product, is one maximum, and with winners a comparison and a predicated move more.
#pragma once

#include "../tiles/fragments.h"
#include "../tiles/launch.h"
#include "query_rows.cuh"
#include "row_maxima.cuh"
#include "tokens.cuh"

namespace jmlr::maxsim {

// Element: of the queries and of the products. kDimension: a block of the embedding, see forward_dimension. kFewRows:
// see forward_tiles. Tokens: see tokens.cuh. Other kernels that stream documents past query rows are derived from
// this one.
template <class Element, int kDimension, bool kFewRows, class Tokens = PlainTokens<Element>>
struct Forward {
    using Stored = typename Tokens::Stored;
    using TokenParams = typename Tokens::Params;
    static constexpr ForwardTiles kTiles = Tokens::tiles_of(int(sizeof(Element)), kDimension, kFewRows);
    static constexpr int kThreads = kTiles.threads();
    static constexpr int kMinBlocks = kTiles.min_blocks;
    static constexpr int kRows = kTiles.rows();
    static constexpr int kTokens = kTiles.tokens;
    static constexpr int kStages = kTiles.stages;
    static constexpr int kRowTiles = kTiles.row_tiles;                 // of 16 rows, of a warp
    static constexpr int kColumnTiles = kTiles.tokens_per_warp() / 8;  // of 8 tokens, of a warp
    static constexpr bool kWalk = kTiles.resident == 0;

    using F = tiles::Fragments<Element>;
    using QueryTile = tiles::SharedTile<Element, kRows, kTiles.chunk>;
    using TextTile = tiles::SharedTile<Element, kTokens, kTiles.chunk>;
    static constexpr int kDepths = kTiles.chunk / F::kDepth;

    struct Params {
        Problem problem;
        ForwardOutput out;
        const int32_t* kept;  // null: every token is kept
        const int32_t* kept_lengths;
        float* scores;  // [row_chunks, Nq, N], or maxima [Nq, N, Lq]
        Divider query_length;
        int64_t row_tiles;  // of all queries
        int row_chunks;     // row tiles of one query
        int queries_per_tile;
        int64_t documents_per_block;
        int lanes_per_query;                  // that add a query's rows: a power of two
        int chunks;                           // of the embedding
        bool whole_queries, whole_documents;  // rows start at multiples of 16 bytes
        TokenParams tokens;
    };

    // Shared memory, in bytes.
    static constexpr int kTokenBytes = Tokens::template kStageBytes<TextTile>;
    static constexpr int kStageBytes = kTokenBytes + (kWalk ? QueryTile::kBytes : 0);
    static constexpr int kStagesAt = kTiles.resident * QueryTile::kBytes;
    static constexpr int kTextAt = kStagesAt + kStages * kStageBytes;  // the decoded tile
    static constexpr int kOwnAt = kTextAt + (Tokens::kDecoded ? TextTile::kBytes : 0);
    static constexpr int kTextScalesAt = kOwnAt + Tokens::template kOwnBytes<TextTile>;  // [stages][tokens]
    static constexpr int kMaximaAt = kTextScalesAt + kStages * kTokens * 4;           // [2][token warps][rows], values
    static constexpr int kPlacesAt = kMaximaAt + 2 * kTiles.token_warps * kRows * 4;  // the same, positions
    static constexpr int kRowScalesAt = kPlacesAt + 2 * kTiles.token_warps * kRows * 4;
    static constexpr int kRowWeightsAt = kRowScalesAt + kRows * 4;
    static constexpr int kRowCountsAt = kRowWeightsAt + kRows * 4;
    static constexpr int kSharedBytes = kRowCountsAt + kRows * 4;
    static_assert(kSharedBytes <= bytes_of(tiles::SharedMemory::small));

    struct RowTile {
        int64_t number;  // among all row tiles
        int64_t first_query;
        int chunk;  // of a query longer than a tile
    };

    static JMLR_DEVICE RowTile row_tile(const Params& p, int64_t number) {
        return {number, number / p.row_chunks * p.queries_per_tile, int(number % p.row_chunks)};
    }

    using Row = QueryRow;

    static JMLR_DEVICE Row row_of(const Params& p, const RowTile& tile, int row) {
        return query_row_of<kRows>(p, tile, row);
    }

    // A document as the tile of queries meets it; with candidates a tile holds one query.
    struct Document {
        Text<Stored> text;
        int length;  // of the kept tokens
        const int32_t* kept;
    };

    static JMLR_DEVICE Document document_of(const Params& p, const RowTile& tile, int64_t number) {
        Document d{text_of<Stored>(p.problem, tile.first_query, number), 0, nullptr};
        d.length = d.text.length;
        if (p.kept != nullptr) {
            d.kept = p.kept + d.text.place;
            d.length = tiles::load(p.kept_lengths + document_number(p.problem, tile.first_query, number));
        }
        return d;
    }

    static JMLR_DEVICE int position_of(const Document& d, int token) {
        return d.kept == nullptr ? token : tiles::load(d.kept + token);
    }

    // Where a block stands in its run of documents: a step is one chunk of one tile of tokens. An empty document has
    // steps too, in which nothing is loaded or multiplied.
    struct Walk {
        int64_t number, last;
        Document document{};
        int first = 0;  // token of the tile
        int chunk = 0;

        JMLR_DEVICE Walk(const Params& p, const RowTile& tile, int64_t from, int64_t to) : number(from), last(to) {
            if (inside()) document = document_of(p, tile, number);
        }
        JMLR_DEVICE bool inside() const { return number < last; }
        JMLR_DEVICE bool empty() const { return document.length == 0; }
        JMLR_DEVICE bool ends_tile(const Params& p) const { return chunk == p.chunks - 1; }
        JMLR_DEVICE bool ends_document(const Params& p) const {
            return ends_tile(p) && first + kTokens >= document.length;
        }

        JMLR_DEVICE void advance(const Params& p, const RowTile& tile) {
            bool tile_ends = ends_tile(p), document_ends = ends_document(p);
            chunk = tile_ends ? 0 : chunk + 1;
            if (document_ends) {
                first = 0;
                ++number;
                if (inside()) document = document_of(p, tile, number);
            } else if (tile_ends) {
                first += kTokens;
            }
        }
    };

    static JMLR_DEVICE int stage_at(int stage) { return kStagesAt + stage * kStageBytes; }
    static JMLR_DEVICE TextTile text_tile(int stage) { return TextTile(Tokens::kDecoded ? kTextAt : stage_at(stage)); }
    static JMLR_DEVICE QueryTile query_tile(int stage, int chunk) {
        return QueryTile(kWalk ? stage_at(stage) + kTokenBytes : chunk * QueryTile::kBytes);
    }
    static JMLR_DEVICE tiles::Shared<float> text_scales(int stage) {
        return tiles::shared_memory<float>(kTextScalesAt) + stage * kTokens;
    }

    static JMLR_DEVICE void fill_queries(const Params& p, const RowTile& tile, const QueryTile& to, int chunk) {
        int first = chunk * kTiles.chunk;
        to.template fill<kThreads>(
            [&](int i) {
                Row row = row_of(p, tile, i);
                return row.inside ? query_row<Element>(p.problem, row.query, row.token) + first : nullptr;
            },
            int(p.problem.dimension) - first, p.whole_queries);
    }

    static JMLR_DEVICE void fill_stage(const Params& p, const RowTile& tile, const Walk& walk, int stage) {
        if (!walk.inside() || walk.empty()) return;
        const Document& d = walk.document;
        auto position = [&](int i) { return position_of(d, tiles::smaller(walk.first + i, d.length - 1)); };
        Tokens::template fetch<TextTile, kThreads>(stage_at(stage), p.problem, p.tokens, d.text, position,
                                                   walk.chunk * kTiles.chunk, p.whole_documents);
        if (kWalk) fill_queries(p, tile, query_tile(stage, 0), walk.chunk);
        const float* scales = token_scales(p);
        if (scales != nullptr && walk.ends_tile(p) && tiles::thread_index() < kTokens) {
            int i = tiles::thread_index();
            text_scales(stage).write(i, tiles::load(scales + d.text.place + position(i)));
        }
    }

    static JMLR_DEVICE const float* token_scales(const Params& p) { return Tokens::scales(p.tokens, p.out); }

    static JMLR_DEVICE void decode_stage(const Params& p, const Walk& walk, int stage) {
        if constexpr (Tokens::kDecoded) {
            if (walk.empty()) return;
            Tokens::template decode<kThreads>(text_tile(stage), stage_at(stage), kOwnAt, p.problem, p.tokens,
                                              walk.document.text, walk.chunk * kTiles.chunk);
            tiles::sync_block();
        }
    }

    // What a warp keeps in registers: its query rows, their similarities with a tile, their maxima so far.
    using QueryRows = typename F::A[kRowTiles][kTiles.registers ? kDepths : 1];
    using Similarities = float[kRowTiles][kColumnTiles][4];
    struct Maxima {
        Maximum of[kRowTiles][2];

        JMLR_DEVICE void clear() {
            JMLR_UNROLL
            for (int i = 0; i < kRowTiles * 2; ++i) of[i / 2][i % 2] = {-tiles::kInfinity, 0};
        }
    };

    static JMLR_DEVICE int first_row() { return tiles::warp() / kTiles.token_warps * kRowTiles * 16; }
    static JMLR_DEVICE int first_token() { return tiles::warp() % kTiles.token_warps * kTiles.tokens_per_warp(); }

    static JMLR_DEVICE void load_rows(QueryRows& rows) {
        if constexpr (kTiles.registers) {
            JMLR_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                JMLR_UNROLL
                for (int k = 0; k < kDepths; ++k) {
                    rows[m][k] = F::load_a(query_tile(0, 0), first_row() + m * 16, k * F::kDepth);
                }
            }
        }
    }

    static JMLR_DEVICE void multiply(Similarities& s, const QueryRows& rows, const QueryTile& query,
                                     const TextTile& text) {
        JMLR_UNROLL_BY(kTiles.depths_unrolled)
        for (int k = 0; k < kDepths; ++k) {
            typename F::A a[kRowTiles];
            JMLR_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                if constexpr (kTiles.registers) a[m] = rows[m][k];
                else a[m] = F::load_a(query, first_row() + m * 16, k * F::kDepth);
            }
            JMLR_UNROLL
            for (int n = 0; n < kColumnTiles; n += 2) {
                typename F::BPair b = F::load_b(text, first_token() + n * 8, k * F::kDepth);
                JMLR_UNROLL
                for (int m = 0; m < kRowTiles; ++m) {
                    F::multiply(s[m][n], a[m], b.b[0]);
                    F::multiply(s[m][n + 1], a[m], b.b[1]);
                }
            }
        }
    }

    static JMLR_DEVICE void clear(Similarities& s) {
        JMLR_UNROLL
        for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i)
            s[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = 0.0f;
    }

    static JMLR_DEVICE void absorb_tile(const Params& p, const Walk& walk, int stage, Similarities& s, Maxima& maxima) {
        if (token_scales(p) != nullptr) scale_columns(s, stage);
        if (Tokens::kWinners && p.out.winners != nullptr) absorb<true>(s, maxima.of, walk.first + first_token());
        else absorb<false>(s, maxima.of, 0);
    }

    static JMLR_DEVICE void scale_columns(Similarities& s, int stage) {
        JMLR_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                float scale = text_scales(stage).read(first_token() + n * 8 + tiles::accumulator_column(i));
                JMLR_UNROLL
                for (int m = 0; m < kRowTiles; ++m) s[m][n][i] *= scale;
            }
        }
    }

    // The four lanes of a row agree, and one of them writes the row's maximum for finish_document.
    static JMLR_DEVICE void publish(const Params&, const Maxima& maxima, int parity) {
        int base = (parity * kTiles.token_warps + tiles::warp() % kTiles.token_warps) * kRows + first_row();
        JMLR_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                Maximum best = row_maximum(maxima.of[m][half]);
                if (tiles::lane() % 4 == 0) {
                    int row = base + m * 16 + tiles::accumulator_row(2 * half);
                    tiles::shared_memory<float>(kMaximaAt).write(row, best.value);
                    tiles::shared_memory<int>(kPlacesAt).write(row, best.position);
                }
            }
        }
    }

    static JMLR_DEVICE Maximum maximum_of(int row, int parity) {
        int place = parity * kTiles.token_warps * kRows + row;
        Maximum best{tiles::shared_memory<float>(kMaximaAt).read(place),
                     tiles::shared_memory<int>(kPlacesAt).read(place)};
        JMLR_UNROLL
        for (int i = 1; i < kTiles.token_warps; ++i) {
            place += kRows;
            best = larger_of(best, {tiles::shared_memory<float>(kMaximaAt).read(place),
                                    tiles::shared_memory<int>(kPlacesAt).read(place)});
        }
        return best;
    }

    // What a row adds to its query's score. An excluded row adds zero, whatever it and its weight hold.
    static JMLR_DEVICE float share_of(int row, float maximum) {
        if (tiles::shared_memory<int>(kRowCountsAt).read(row) == 0) return 0.0f;
        return maximum * tiles::shared_memory<float>(kRowScalesAt).read(row) *
               tiles::shared_memory<float>(kRowWeightsAt).read(row);
    }

    // Writes what the rows' maxima give: winners, maxima, scores. A barrier lies between `publish` and this.
    static JMLR_DEVICE void finish_document(const Params& p, const RowTile& tile, const Row& own, int64_t number,
                                            const Document& d, int parity) {
        const Problem& problem = p.problem;
        bool empty = d.length == 0;
        // A longer document's winners would not fit their integer: loud, not wrong.
        bool too_long = problem.cu_seqlens != nullptr && problem.max_length > 0 && d.text.length > problem.max_length;
        float nobody = too_long ? tiles::bit_cast<float>(0x7fc00000u) : 0.0f;
        int i = tiles::thread_index();
        if (Tokens::kWinners && i < kRows && own.inside && (p.out.winners != nullptr || p.out.per_token)) {
            Maximum best = empty ? Maximum{0.0f, 0} : maximum_of(i, parity);
            int64_t entry = (own.query * problem.documents_per_query + number) * problem.query_length + own.token;
            if (p.out.winners != nullptr) {
                bool won = !empty && tiles::shared_memory<int>(kRowCountsAt).read(i) != 0;
                store_winner(p.out.winners, p.out.code.type, entry,
                             won ? position_of(d, best.position) : p.out.code.none);
            }
            if (p.out.per_token) tiles::store(p.scores + entry, empty || too_long ? nobody : share_of(i, best.value));
        }
        if (Tokens::kWinners && p.out.per_token) return;
        store_scores(p, tile, number, !empty && !too_long, nobody,
                     [&](int row) { return share_of(row, maximum_of(row, parity).value); });
    }

    template <class Share>
    static JMLR_DEVICE void store_scores(const Params& p, const RowTile& tile, int64_t number, bool counts,
                                         float nobody, Share share) {
        maxsim::store_scores<kRows, kThreads>(p, tile, tiles::thread_index(), number, counts, nobody, share);
    }

    static JMLR_DEVICE Row prepare_row(const Params& p, const RowTile& tile) {
        int i = tiles::thread_index();
        Row row = row_of(p, tile, i);
        if (i < kRows) {
            bool counts = row.inside && query_token_counts(p.problem, row.query, row.token);
            float scale = 1.0f;
            if (counts && p.out.query_scales != nullptr) {
                scale = tiles::load(p.out.query_scales + row.query * p.problem.query_length + row.token);
            }
            tiles::shared_memory<int>(kRowCountsAt).write(i, counts);
            tiles::shared_memory<float>(kRowScalesAt).write(i, scale);
            tiles::shared_memory<float>(kRowWeightsAt)
                .write(i, counts ? query_weight(p.problem, row.query, row.token) : 0.0f);
        }
        return row;
    }

    static JMLR_DEVICE void run(const Params& p) { stream<Forward>(p); }

    // Kernel: this one or a struct derived from it, with its own Maxima, absorb_tile, publish and finish_document.
    template <class Kernel>
    static JMLR_DEVICE void stream(const typename Kernel::Params& p) {
        RowTile tile = row_tile(p, tiles::block_index() % p.row_tiles);  // neighbouring blocks share documents
        int64_t from = tiles::block_index() / p.row_tiles * p.documents_per_block;
        int64_t to = tiles::smaller(from + p.documents_per_block, p.problem.documents_per_query);

        Row own = prepare_row(p, tile);
        if constexpr (Tokens::kDecoded) Tokens::template prepare<kThreads>(kOwnAt, p.tokens);
        for (int chunk = 0; chunk < kTiles.resident; ++chunk) fill_queries(p, tile, query_tile(0, chunk), chunk);
        Walk filling(p, tile, from, to), reading = filling;
        JMLR_UNROLL
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fill_stage(p, tile, filling, stage);
            tiles::commit_copies();
            if (filling.inside()) filling.advance(p, tile);
        }
        QueryRows rows;
        if constexpr (kTiles.registers) {
            tiles::wait_copies<kStages - 2>();
            tiles::sync_block();
            load_rows(rows);
        }

        Similarities s;
        typename Kernel::Maxima maxima;
        Document finished{};
        int64_t finished_number = -1;
        int stage = 0, parity = 0;
        for (; reading.inside(); reading.advance(p, tile)) {
            tiles::wait_copies<kStages - 2>();
            tiles::sync_block();  // the stage has arrived, and nobody reads the one before any more
            fill_stage(p, tile, filling, (stage + kStages - 1) % kStages);
            tiles::commit_copies();
            if (filling.inside()) filling.advance(p, tile);
            if (finished_number >= 0) Kernel::finish_document(p, tile, own, finished_number, finished, parity ^ 1);
            finished_number = -1;
            decode_stage(p, reading, stage);

            if (!reading.empty()) {
                if (reading.chunk == 0) {
                    clear(s);
                    if (reading.first == 0) maxima.clear();
                }
                multiply(s, rows, query_tile(stage, reading.chunk), text_tile(stage));
                if (reading.ends_tile(p)) Kernel::absorb_tile(p, reading, stage, s, maxima);
            }
            if (reading.ends_document(p)) {
                if (!reading.empty()) Kernel::publish(p, maxima, parity);
                finished = reading.document;
                finished_number = reading.number;
                parity ^= 1;
            }
            stage = (stage + 1) % kStages;
        }
        tiles::wait_copies<0>();
        tiles::sync_block();
        if (finished_number >= 0) Kernel::finish_document(p, tile, own, finished_number, finished, parity ^ 1);
    }
};

}  // namespace jmlr::maxsim
