// MaxSim forward by warpgroups: query rows stay in registers, copies of boxes stream documents past them.
//
// One thread of a warpgroup of its own walks the documents (sm90_walk.cuh) and has tiles of their tokens copied into a
// ring of stages. All other warpgroups multiply. Each owns tiles of query rows: of several queries, since rows never
// mix, or a part of one long query, whose parts SumParts adds up. What a document's rows add up to stays within one.
//
// The maxima hide behind the products: a warpgroup takes those of its first row tile while the tensor cores work on
// its second, and those of the second while they work for the other warpgroup, which begins its tiles half a tile later
// (`ordered`).
//
// A tile with excluded tokens, or that reaches past the document's end, replaces their similarities by -inf before the
// maxima are taken; what the tokens themselves hold, NaN or another document, stays in columns of their own.
#pragma once

#include "../tiles/fragments.h"
#include "../tiles/hopper.h"
#include "../tiles/launch.h"
#include "query_rows.cuh"
#include "sm90_maxima.cuh"
#include "sm90_walk.cuh"

namespace jmlr::maxsim::sm90 {

template <class Element, int kDimension, Sharing kSharing>
struct Forward {
    static constexpr ForwardTiles kTiles = forward_tiles(kDimension, kSharing);
    static constexpr int kThreads = kTiles.threads();
    static constexpr int kMinBlocks = 1;
    static constexpr int kRows = kTiles.rows();  // of a warpgroup
    static constexpr int kRowTiles = kTiles.row_tiles;
    static constexpr int kTokens = kTiles.tokens;
    static constexpr int kDepths = kDimension / 16;
    static constexpr int kRings = kTiles.in_turns ? kTiles.groups : 1;
    static constexpr int kRingStages = kTiles.stages / kRings;

    using F = tiles::Fragments<Element>;
    using TextTile = tiles::Panels<Element, kTokens, kDimension>;
    using Ring = tiles::Ring<kRingStages>;

    static_assert(!kTiles.ordered || (kTiles.groups == 2 && !kTiles.in_turns));
    static_assert(kRowTiles <= 2 && kRings <= 2 && kTiles.stages % kRings == 0 && kRingStages >= 1);
    static_assert(kTokens <= 128 && kTokens % kTiles.step == 0 && kTokens % kTiles.box == 0);
    static_assert(kTiles.step % 16 == 0 && kTiles.box % 8 == 0 && kDimension % 64 == 0);

    struct Params {
        tiles::TensorMap documents;
        Problem problem;
        ForwardOutput out;
        const uint32_t* bits;  // of the document mask; null: every token is kept
        const Extent* extents;
        float* scores;  // [row_chunks, Nq, N], or maxima [Nq, N, Lq]
        Divider query_length;
        int row_chunks;        // row tiles of one query
        int queries_per_tile;  // 1 with candidates, which no other query shares
        int tiles_per_list;    // row tiles that share documents
        int64_t sets;          // of row tiles that a block holds at once
        int sets_per_list;     // those that share documents
        int lanes_per_query;
        bool whole_queries;  // pairs of columns start at multiples of 4 bytes
    };

    // Shared memory, in bytes.
    static constexpr int kNotesAt = kTiles.stages * TextTile::kBytes;
    static constexpr int kMaximaAt = kNotesAt + kTiles.stages * int(sizeof(Note));  // [groups][2][rows]
    static constexpr int kWeightsAt = kMaximaAt + kTiles.groups * 2 * kRows * int(sizeof(Maximum));  // [groups][rows]
    static constexpr int kCountsAt = kWeightsAt + kTiles.groups * kRows * 4;
    static constexpr int kFullAt = kCountsAt + kTiles.groups * kRows * 4;
    static constexpr int kEmptyAt = kFullAt + kTiles.stages * 8;
    static constexpr int kSharedBytes = kEmptyAt + kTiles.stages * 8;
    static_assert(kSharedBytes <= tiles::kSharedOfHopper);

    static JMLR_DEVICE TextTile text_tile(int stage) { return TextTile{stage * TextTile::kBytes}; }
    static JMLR_DEVICE tiles::Barrier full(int stage) { return tiles::Barrier(kFullAt + stage * 8); }
    static JMLR_DEVICE tiles::Barrier empty(int stage) { return tiles::Barrier(kEmptyAt + stage * 8); }
    static JMLR_DEVICE tiles::Shared<Note> note_of(int stage) { return tiles::shared_memory<Note>(kNotesAt) + stage; }

    struct RowTile {
        int64_t first_query;  // past the last one: there is no such tile
        int chunk;            // of a query longer than a tile
    };

    static JMLR_DEVICE RowTile row_tile(const Params& p, int set, int group) {
        int list = set / p.sets_per_list, within = set - list * p.sets_per_list;
        if (!kTiles.in_turns) within = within * kTiles.groups + group;
        if (within >= p.tiles_per_list) return {p.problem.query_count, 0};
        int number = list * p.tiles_per_list + within, queries = number / p.row_chunks;
        return {int64_t(queries) * p.queries_per_tile, number - queries * p.row_chunks};
    }

    using Rows = typename F::A[kRowTiles][kDepths];
    using Maxima = Maximum[kRowTiles][2];

    // A warpgroup, which is all that its threads have in common.
    struct Group {
        const Params& p;
        const int number = tiles::warp() / tiles::kWarpgroupWarps;
        const int warp = tiles::warp() % tiles::kWarpgroupWarps;
        const int thread = tiles::thread_index() % tiles::kWarpgroup;
        const int turn = kTiles.in_turns ? number : 0;
        RowTile tile{};
        Maxima maxima;
        int parity = 0;  // of the buffer of maxima

        JMLR_DEVICE explicit Group(const Params& params) : p(params) {}

        // Tiles of tokens begin in turns: a warpgroup's after the other has half of its own, so that they are not both
        // at their maxima while the tensor cores have nothing.
        static constexpr int kTurnBarriers = 1 + kTiles.groups, kTurnThreads = 2 * tiles::kWarpgroup;
        JMLR_DEVICE void await_turn() const {
            if (kTiles.ordered) tiles::sync_threads_of(kTurnBarriers + number, kTurnThreads);
        }
        JMLR_DEVICE void pass_turn() const {
            if (kTiles.ordered) tiles::arrive_for(kTurnBarriers + (number ^ 1), kTurnThreads);
        }

        JMLR_DEVICE void sync() const { tiles::sync_threads_of(1 + number, tiles::kWarpgroup); }
        JMLR_DEVICE int stage(const Ring& ring) const { return turn + kRings * ring.stage; }
        JMLR_DEVICE int own(int bytes_at, int row) const { return bytes_at + (number * kRows + row) * 4; }
        JMLR_DEVICE tiles::Shared<Maximum> published() const {
            return tiles::shared_memory<Maximum>(kMaximaAt) + (number * 2 + parity) * kRows;
        }

        JMLR_DEVICE void clear() {
            JMLR_UNROLL
            for (int m = 0; m < kRowTiles; ++m) maxima[m][0] = maxima[m][1] = {-tiles::kInfinity, -1};
        }

        // Pairs of columns straight into the registers that the products want: it happens once for many documents.
        JMLR_DEVICE void load_rows(int set, Rows& rows) {
            const Problem& problem = p.problem;
            tile = row_tile(p, set, number);
            JMLR_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                JMLR_UNROLL
                for (int half = 0; half < 2; ++half) {
                    QueryRow row = query_row_of<kRows>(p, tile, m * 64 + warp * 16 + tiles::accumulator_row(2 * half));
                    const Element* from = row.inside ? query_row<Element>(problem, row.query, row.token) : nullptr;
                    JMLR_UNROLL
                    for (int k = 0; k < kDepths * 2; ++k) {
                        uint32_t pair = tiles::pack<Element>(1.0f, 1.0f);  // absent rows: maxima that have sums
                        int column = k * 8 + tiles::accumulator_column(0);
                        if (row.inside) {
                            auto slice = load_slice<2>(from, column, int(problem.dimension), p.whole_queries);
                            pair = word_of<Element>(slice, 0);
                        }
                        rows[m][k / 2].r[half + k % 2 * 2] = pair;
                    }
                }
            }
            sync();  // nobody reads the last set's weights any more
            if (thread < kRows) {
                QueryRow row = query_row_of<kRows>(p, tile, thread);
                bool counts = row.inside && query_token_counts(problem, row.query, row.token);
                tiles::shared_memory<int>(own(kCountsAt, thread)).write(0, counts);
                tiles::shared_memory<float>(own(kWeightsAt, thread))
                    .write(0, counts ? query_weight(problem, row.query, row.token) : 0.0f);
            }
        }

        // What a row adds to its query's score. An excluded row adds zero, whatever it and its weight hold.
        JMLR_DEVICE float share_of(int row, float maximum) const {
            if (tiles::shared_memory<int>(own(kCountsAt, row)).read() == 0) return 0.0f;
            return maximum * tiles::shared_memory<float>(own(kWeightsAt, row)).read();
        }

        // After a document's last tile: winners, maxima, scores. `empty`: it has no kept token.
        JMLR_DEVICE void finish_document(const Note& note, bool empty) {
            const Problem& problem = p.problem;
            JMLR_UNROLL
            for (int i = 0; i < kRowTiles * 2; ++i) {
                Maximum best = row_maximum(maxima[i / 2][i % 2]);
                if (tiles::lane() % 4 == 0) {
                    published().write(i / 2 * 64 + warp * 16 + tiles::accumulator_row(i % 2 * 2), best);
                }
            }
            clear();
            sync();
            bool too_long = (note.state & kTooLong) != 0;
            float nobody = too_long ? tiles::bit_cast<float>(0x7fc00000u) : 0.0f;
            if (p.out.winners != nullptr || p.out.per_token) {
                QueryRow row = query_row_of<kRows>(p, tile, thread);
                if (thread < kRows && row.inside) {
                    Maximum best = published().read(thread);
                    int64_t pair = row.query * problem.documents_per_query + note.document;
                    int64_t entry = pair * problem.query_length + row.token;
                    if (p.out.winners != nullptr) {
                        bool won = !empty && tiles::shared_memory<int>(own(kCountsAt, thread)).read() != 0;
                        int position = best.position < 0 ? note.begin : best.position;  // all are -inf
                        store_winner(p.out.winners, p.out.code.type, entry, won ? position : p.out.code.none);
                    }
                    if (p.out.per_token) {
                        tiles::store(p.scores + entry, empty || too_long ? nobody : share_of(thread, best.value));
                    }
                }
            }
            if (!p.out.per_token) {
                store_scores<kRows, tiles::kWarpgroup>(
                    p, tile, thread, note.document, !empty && !too_long, nobody,
                    [&](int row) { return share_of(row, published().read(row).value); });
            }
            parity ^= 1;
        }

        // The products of the stage's first kColumns tokens, and the maxima.
        template <int kColumns>
        JMLR_DEVICE void take_columns(const Rows& rows, int at, const Note& note) {
            float s[kRowTiles][kColumns / 8][4];
            await_turn();
            JMLR_UNROLL
            for (int m = 0; m < kRowTiles; ++m) {
                tiles::open_products(s[m]);
                JMLR_UNROLL
                for (int k = 0; k < kDepths; ++k) {
                    tiles::multiply_async<Element, tiles::Major::inner>(
                        s[m], rows[m][k].r, tiles::inner_matrix(text_tile(at), 0, k * 16), k > 0);
                }
                tiles::close_products();
            }
            if constexpr (kRowTiles == 2) {
                tiles::wait_products<1>(s[0]);
                pass_turn();
                absorb(s[0], maxima[0], note);
                tiles::wait_products<0>(s[1]);
            } else {
                tiles::wait_products<0>(s[0]);
                pass_turn();
            }
            release(at);
            absorb(s[kRowTiles - 1], maxima[kRowTiles - 1], note);
        }

        template <int kColumnTiles>
        JMLR_DEVICE void absorb(float (&s)[kColumnTiles][4], Maximum (&best)[2], const Note& note) const {
            absorb_tile<kTiles.by_sums>(s, best, note.kept, (note.state & kWhole) != 0, note.first,
                                        p.out.winners != nullptr);
        }

        // As many columns as count.
        template <int kColumns = kTiles.step>
        JMLR_DEVICE void take_tile(const Rows& rows, int at, const Note& note, int columns) {
            if constexpr (kColumns < kTokens) {
                if (columns > kColumns) return take_tile<kColumns + kTiles.step>(rows, at, note, columns);
            }
            take_columns<kColumns>(rows, at, note);
        }

        // All lanes have read the note.
        JMLR_DEVICE void release(int at) const {
            tiles::sync_warp();
            if (tiles::lane() == 0) empty(at).arrive();
        }

        JMLR_DEVICE void run() {
            Rows rows;
            Ring ring;
            int set = -1;
            clear();
            if (number == 1) pass_turn();
            for (;;) {
                int at = stage(ring);
                full(at).wait(ring.parity);
                Note note = note_of(at).read();
                note.state = tiles::shuffle(note.state, 0);
                if (note.state & kStop) break;
                int columns = int(note.state & kColumnsMask);
                if (note.set != set) {
                    set = note.set;
                    load_rows(set, rows);
                }
                if (columns > 0) take_tile(rows, at, note, columns);
                else release(at);
                if (note.state & kEnds) finish_document(note, columns == 0);
                ring.advance();
            }
            if (number == 0) await_turn();  // nobody is left half way through a barrier
        }
    };

    static JMLR_DEVICE void run(const Params& p) {
        if (tiles::thread_index() == 0) {
            JMLR_UNROLL
            for (int stage = 0; stage < kTiles.stages; ++stage) {
                full(stage).init(1);
                empty(stage).init((kTiles.in_turns ? 1 : kTiles.groups) * tiles::kWarpgroupWarps);
            }
            tiles::fence_barriers();
        }
        tiles::sync_block();
        if (tiles::warp() / tiles::kWarpgroupWarps == kTiles.groups) {
            tiles::give_registers<40>();
            if (tiles::thread_index() == kTiles.groups * tiles::kWarpgroup) {
                tiles::prefetch_map(p.documents);
                Walk<Forward>{p}.run();
            }
        } else {
            tiles::take_registers<kTiles.groups == 2 ? 232 : 160>();
            Group(p).run();
        }
    }
};

}  // namespace jmlr::maxsim::sm90
