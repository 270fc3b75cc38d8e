// dk and dv: a block owns a tile of keys of a kv head and keeps both in registers. It walks the query heads that share
// the kv head, plain and shifted, in order, and for each of them the queries from the tile to the end of its group(s),
// in two stages.
#pragma once

#include "backward.cuh"

namespace jmlr::shifted_attention {

template <class Element, int kBlockD, SharedMemory kShared>
struct BackwardDkDv {
    static constexpr TileSizes kSizes = tile_sizes(Kernel::backward_dkdv, int(sizeof(Element)), kBlockD, kShared);
    static constexpr int kBlockM = kSizes.block_m, kBlockN = kSizes.block_n, kBands = kSizes.bands,
                         kParts = kSizes.parts;
    static constexpr int kThreads = threads_of(Kernel::backward_dkdv, kSizes), kMinBlocks = kSizes.min_blocks;
    static constexpr int kPartD = kBlockD / kParts;

    using Params = BackwardParams<Element>;
    using Fragments = tiles::Fragments<Element>;
    using QueryTile = tiles::SharedTile<Element, kBlockM, kBlockD>;
    using KeyTile = tiles::SharedTile<Element, kBlockN, kBlockD>;
    // Keys are rows here, so that no accumulator must be transposed.
    using Scores = float[kBands][kBlockM / 8][4];
    using Sums = float[kBands][kPartD / 8][4];
    // A stage: queries, gradients of their outputs, their lse in base 2, their delta.
    static constexpr int kStage = 2 * QueryTile::kBytes + 2 * kBlockM * int(sizeof(float));
    static constexpr int kSharedBytes = 2 * KeyTile::kBytes + 2 * kStage;
    static_assert(kSharedBytes <= bytes_of(kShared));
    static_assert(kBlockM <= kThreads);

    static JMLR_DEVICE void run(const Params& p) {
        Work work = work_of<kBlockN, false>(p.layout, int(tiles::block_index()), p.layout.heads / p.layout.ratio);
        const Document& document = work.document;
        if (work.tile >= document.owned) return;
        Groups tokens{p.layout.group_size, 0, 0, document.length};  // keys are walked as they are
        Sums dk = {}, dv = {};
        if (work.tile < document.length) walk_queries(p, work, tokens, dk, dv);

        int row = tiles::warp() / kParts * 16 * kBands, column = tiles::warp() % kParts * kPartD;
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                bool inside = work.tile + row + 16 * band + tiles::accumulator_row(i) < document.length;
                JMLR_UNROLL
                for (int n = 0; n < kPartD / 8; ++n) {
                    dk[band][n][i] = inside ? dk[band][n][i] * p.scale : 0;
                    dv[band][n][i] = inside ? dv[band][n][i] : 0;
                }
            }
        }
        KeyTile staged_dk(0), staged_dv(KeyTile::kBytes);
        tiles::sync_block();
        tiles::write_bands(staged_dk, row, column, dk);
        tiles::write_bands(staged_dv, row, column, dv);
        tiles::sync_block();
        store_rows<kThreads>(staged_dk, p.dk, document, work.head, tokens, work.tile, p.head_dim);
        store_rows<kThreads>(staged_dv, p.dv, document, work.head, tokens, work.tile, p.head_dim);
    }

private:
    // The queries of one head that see some of a tile's keys. From position `full` on, all of them see all keys. Those
    // from `end` on have no weights without a mask: for them lse is infinite.
    struct Walk {
        int head;
        Groups groups;
        int tile, end, full;
    };

    static JMLR_DEVICE Walk walk_of(const Params& p, const Work& work, int head) {
        int length = work.document.length, last = smaller(work.tile + kBlockN, length) - 1;
        Groups groups = groups_of(p.layout, head, length);
        // The tile that holds token `roll` has its keys at both ends of the positions: it walks all of them.
        if (groups.roll > work.tile && groups.roll <= last) return {head, groups, 0, length, length};
        int first_position = groups.position(work.tile), last_position = groups.position(last);
        int end = groups.end(last_position);
        return {head, groups, first_position, end, groups.end(first_position) == end ? last_position : end};
    }

    struct Stage {
        QueryTile queries, grads;
        tiles::Shared<float> log_sums, deltas;

        JMLR_DEVICE explicit Stage(int stage)
            : queries(offset(stage)),
              grads(offset(stage) + QueryTile::kBytes),
              log_sums(tiles::shared_memory<float>(offset(stage) + 2 * QueryTile::kBytes)),
              deltas(log_sums + kBlockM) {}
        static JMLR_DEVICE int offset(int stage) { return 2 * KeyTile::kBytes + stage * kStage; }
    };

    static JMLR_DEVICE void walk_queries(const Params& p, const Work& work, const Groups& tokens, Sums& dk, Sums& dv) {
        const Document& document = work.document;
        load_rows<kThreads>(KeyTile(0), p.k, document, work.head, tokens, work.tile, document.length, p.head_dim);
        load_rows<kThreads>(KeyTile(KeyTile::kBytes), p.v, document, work.head, tokens, work.tile, document.length,
                            p.head_dim);

        int last_head = (work.head + 1) * p.layout.ratio - 1;
        Walk next = walk_of(p, work, work.head * p.layout.ratio);
        float log_sum, delta;  // of one query of the next tile, on their way to shared memory
        auto copy_next = [&](int stage) {
            Stage to(stage);
            load_rows<kThreads>(to.queries, p.q, document, next.head, next.groups, next.tile, next.end, p.head_dim);
            load_rows<kThreads>(to.grads, p.grad_out, document, next.head, next.groups, next.tile, next.end,
                                p.head_dim);
            load_statistics(p, document, next, log_sum, delta);
        };
        auto write_statistics = [&](int stage) {
            if (tiles::thread_index() >= kBlockM) return;
            Stage(stage).log_sums.write(tiles::thread_index(), log_sum);
            Stage(stage).deltas.write(tiles::thread_index(), delta);
        };

        copy_next(0);
        tiles::commit_copies();
        write_statistics(0);
        for (int stage = 0; next.head <= last_head; stage ^= 1) {
            Walk now = next;
            next.tile += kBlockM;
            if (next.tile >= next.end) {
                next.head += 1;
                if (next.head <= last_head) next = walk_of(p, work, next.head);
            }
            tiles::wait_copies<0>();
            tiles::sync_block();  // this stage is there, and nobody needs the other
            if (next.head <= last_head) copy_next(stage ^ 1);
            tiles::commit_copies();
            take(p, work, now, Stage(stage), dk, dv);
            if (next.head <= last_head) write_statistics(stage ^ 1);
        }
        tiles::wait_copies<0>();
    }

    static JMLR_DEVICE void load_statistics(const Params& p, const Document& document, const Walk& walk, float& log_sum,
                                            float& delta) {
        log_sum = tiles::kInfinity, delta = 0;
        int position = walk.tile + tiles::thread_index();
        if (tiles::thread_index() >= kBlockM || position >= walk.end) return;
        int64_t at = statistics_of(p.layout, document, walk.head) + walk.groups.token(position);
        log_sum = tiles::load(p.lse + at) * tiles::kLog2E;
        delta = tiles::load(p.delta + at);
    }

    // Adds to dk (without the scale) and dv what one tile of queries contributes.
    static JMLR_DEVICE void take(const Params& p, const Work& work, const Walk& walk, const Stage& stage, Sums& dk,
                                 Sums& dv) {
        KeyTile keys(0), values(KeyTile::kBytes);
        int row = tiles::warp() / kParts * 16 * kBands, column = tiles::warp() % kParts * kPartD;
        Scores weights = {};
        tiles::multiply_bands<Fragments, kBlockD, kSizes.unroll>(
            weights, [&](int band, int k) { return Fragments::load_a(keys, row, 16 * band, k); },
            [&](int n, int k) { return Fragments::load_b(stage.queries, n, k); });
        JMLR_UNROLL
        for (int n = 0; n < kBlockM / 8; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                float log_sum = stage.log_sums.read(8 * n + tiles::accumulator_column(i));
                JMLR_UNROLL
                for (int band = 0; band < kBands; ++band) {
                    weights[band][n][i] = tiles::exp2_approximate(weights[band][n][i] * p.scale_log2 - log_sum);
                }
            }
        }
        if (walk.tile < walk.full) mask(weights, walk, work.tile + row);
        tiles::multiply_bands<Fragments, kBlockM>(
            dv, [&](int band, int k) { return Fragments::from_accumulators(&weights[band][k / 8]); },
            [&](int n, int k) { return Fragments::load_b_transposed(stage.grads, column + n, k); });

        Scores grad_weights = {};
        tiles::multiply_bands<Fragments, kBlockD, kSizes.unroll>(
            grad_weights, [&](int band, int k) { return Fragments::load_a(values, row, 16 * band, k); },
            [&](int n, int k) { return Fragments::load_b(stage.grads, n, k); });
        JMLR_UNROLL
        for (int n = 0; n < kBlockM / 8; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                float delta = stage.deltas.read(8 * n + tiles::accumulator_column(i));
                JMLR_UNROLL
                for (int band = 0; band < kBands; ++band) weights[band][n][i] *= grad_weights[band][n][i] - delta;
            }
        }
        tiles::multiply_bands<Fragments, kBlockM>(
            dk, [&](int band, int k) { return Fragments::from_accumulators(&weights[band][k / 8]); },
            [&](int n, int k) { return Fragments::load_b_transposed(stage.queries, column + n, k); });
    }

    static JMLR_DEVICE void mask(Scores& weights, const Walk& walk, int token) {
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                int key_position = walk.groups.position(token + 16 * band + tiles::accumulator_row(2 * half));
                int key_end = walk.groups.end(key_position);
                JMLR_UNROLL
                for (int n = 0; n < kBlockM / 8; ++n) {
                    JMLR_UNROLL
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        int position = walk.tile + 8 * n + tiles::accumulator_column(i);
                        bool attends = position >= key_position && position < key_end;
                        weights[band][n][i] = attends ? weights[band][n][i] : 0;
                    }
                }
            }
        }
    }
};

}  // namespace jmlr::shifted_attention
