// delta = rowsum(grad_out * out), and dq, on compute capability 9.0. A consuming warpgroup owns 64 queries of one head;
// a producing warp brings their rows and walks the keys of their group(s) ahead of it.
//
// Of a tile of keys, the exponentials are taken while grad_out v^T is being computed, and the products of one
// warpgroup run under the arithmetic of the other. S = q k^T of the next tile follows dS k of this one without a pause.
#pragma once

#include "sm90_backward.cuh"

namespace jmlr::shifted_attention::sm90 {

template <class Element, int kBlockD>
struct BackwardDq {
    static constexpr BackwardTiles kTiles = backward_dq_tiles(kBlockD);
    static constexpr int kConsumers = kTiles.consumers, kKeys = kTiles.streamed, kStages = kTiles.stages,
                         kBuffers = kTiles.buffers;
    static constexpr int kOwned = 64, kBlockM = kOwned * kConsumers;
    static constexpr int kThreads = tiles::kWarpgroup * (kConsumers + 1), kMinBlocks = 1;

    using Params = BackwardParams<Element>;
    using QueryTile = Panels<Element, kOwned, kBlockD>;
    using KeyTile = Panels<Element, kKeys, kBlockD>;
    using Scores = float[kKeys / 8][4];
    using Sums = float[kBlockD / 8][4];

    static constexpr int kOwnBytes = 2 * QueryTile::kBytes, kStageBytes = 2 * KeyTile::kBytes;
    static constexpr int kStagesAt = kConsumers * kBuffers * kOwnBytes;
    static constexpr int kBarriersAt = kStagesAt + kStages * kStageBytes;
    static constexpr int kBarriers = 2 * kStages + 2 * kConsumers * kBuffers + 1;
    static constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
    static_assert(kSharedBytes <= tiles::kSharedOfHopper);

    static JMLR_DEVICE void run(const Params& p) {
        int warpgroup = tiles::warp() / tiles::kWarpgroupWarps;
        if (tiles::thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                full(stage).init(1);
                empty(stage).init(kConsumers * tiles::kWarpgroupWarps);
            }
            for (int i = 0; i < kConsumers * kBuffers; ++i) own_full(0, i).init(1), own_empty(0, i).init(1);
            Barrier(landed_at()).init(1);
            tiles::fence_barriers();
        }
        tiles::sync_block();
        if (warpgroup == kConsumers) {
            tiles::give_registers<kTiles.producer_registers>();
            if (tiles::warp() % tiles::kWarpgroupWarps == 0) produce(p);
        } else {
            tiles::take_registers<kTiles.consumer_registers>();
            consume(p, warpgroup);
        }
    }

private:
    static JMLR_DEVICE Barrier full(int stage) { return Barrier(kBarriersAt + 16 * stage); }
    static JMLR_DEVICE Barrier empty(int stage) { return Barrier(kBarriersAt + 16 * stage + 8); }
    static JMLR_DEVICE Barrier own_full(int warpgroup, int buffer) {
        return Barrier(kBarriersAt + 16 * (kStages + warpgroup * kBuffers + buffer));
    }
    static JMLR_DEVICE Barrier own_empty(int warpgroup, int buffer) {
        return Barrier(kBarriersAt + 16 * (kStages + warpgroup * kBuffers + buffer) + 8);
    }
    static constexpr int landed_at() { return kBarriersAt + 8 * (kBarriers - 1); }

    static JMLR_DEVICE QueryTile queries_of(int warpgroup, int buffer) {
        return {(warpgroup * kBuffers + buffer) * kOwnBytes};
    }
    static JMLR_DEVICE QueryTile grads_of(int warpgroup, int buffer) {
        return {(warpgroup * kBuffers + buffer) * kOwnBytes + QueryTile::kBytes};
    }
    static JMLR_DEVICE KeyTile keys_of(int stage) { return {kStagesAt + stage * kStageBytes}; }
    static JMLR_DEVICE KeyTile values_of(int stage) { return {kStagesAt + stage * kStageBytes + KeyTile::kBytes}; }

    static JMLR_DEVICE void produce(const Params& p) {
        Ring<kStages> ring;
        Ring<kBuffers> own[kConsumers];
        Fetcher fetcher(landed_at());
        for (int64_t item = tiles::block_index(); item < p.items; item += tiles::block_count()) {
            Work work = work_of<kBlockM, true>(p.layout, int(item), p.layout.heads);
            const Document& document = work.document;
            if (work.tile >= document.length) continue;
            JMLR_UNROLL
            for (int w = 0; w < kConsumers; ++w) {
                int row = work.tile + w * kOwned;
                if (row >= document.length) continue;
                own_empty(w, own[w].stage).wait(own[w].parity ^ 1);
                if (tiles::lane() == 0) {
                    Barrier barrier = own_full(w, own[w].stage);
                    barrier.arrive_expecting(kOwnBytes);
                    copy_rows(queries_of(w, own[w].stage), p.q, barrier, document, work.head, row);
                    copy_rows(grads_of(w, own[w].stage), p.grad_out, barrier, document, work.head, row);
                }
                own[w].advance();
            }
            int end = smaller(work.tile + kBlockM, document.length), kv_head = work.head / p.layout.ratio;
            for (int tile = groups_of(p.layout, work.head, document.length).start(work.tile); tile < end;
                 tile += kKeys) {
                KeyTile keys = keys_of(ring.stage), values = values_of(ring.stage);
                empty(ring.stage).wait(ring.parity ^ 1);
                fetcher.fetch(
                    full(ring.stage), kStageBytes,
                    [&](const Barrier& barrier) {
                        copy_rows(keys, p.k, barrier, document, kv_head, tile);
                        copy_rows(values, p.v, barrier, document, kv_head, tile);
                    },
                    has_foreign_rows(p.layout, document, tile, kKeys),
                    [&] { clear_rows(keys, document.length - tile); });
                ring.advance();
            }
        }
    }

    static JMLR_DEVICE void consume(const Params& p, int warpgroup) {
        Ring<kStages> ring;
        Ring<kBuffers> own;
        for (int64_t item = tiles::block_index(); item < p.items; item += tiles::block_count()) {
            Work work = work_of<kBlockM, true>(p.layout, int(item), p.layout.heads);
            const Document& document = work.document;
            if (work.tile >= document.owned) continue;
            int first = work.tile + warpgroup * kOwned;
            if (first >= document.length) {
                if (work.tile < document.length) pass_keys(p, work, ring);
                store_zeros<kOwned>(p.dq_rows, document, work.head, first, p.head_dim);
                continue;
            }
            QueryTile queries = queries_of(warpgroup, own.stage), grads = grads_of(warpgroup, own.stage);
            own_full(warpgroup, own.stage).wait(own.parity);
            Sums dq = {};
            walk_keys(p, work, first, queries, grads, ring, dq);

            int row = tiles::warp() % tiles::kWarpgroupWarps * 16;
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                bool inside = first + row + tiles::accumulator_row(i) < document.length;
                JMLR_UNROLL
                for (int n = 0; n < kBlockD / 8; ++n) dq[n][i] = inside ? dq[n][i] * p.scale : 0;
            }
            tiles::sync_threads_of(1 + warpgroup, tiles::kWarpgroup);  // nobody needs the queries
            write_rows(queries, row, dq);
            store_staged(queries, p.dq, p.dq_rows, document, work.head, first, p.head_dim, 1 + warpgroup);
            if (tiles::thread_index() % tiles::kWarpgroup == 0) own_empty(warpgroup, own.stage).arrive();
            own.advance();
        }
    }

    // Of a lane's rows: lse in base 2, and delta.
    struct Statistics {
        float log_sum[2], delta[2];
    };

    static JMLR_DEVICE void pass(Ring<kStages>& ring) {
        full(ring.stage).wait(ring.parity);
        release(ring.stage);
        ring.advance();
    }
    static JMLR_DEVICE void release(int stage) {
        if (tiles::lane() == 0) empty(stage).arrive();
    }
    static JMLR_DEVICE void pass_keys(const Params& p, const Work& work, Ring<kStages>& ring) {
        int begin = groups_of(p.layout, work.head, work.document.length).start(work.tile);
        for (int tile = begin; tile < work.document.length; tile += kKeys) pass(ring);
    }

    static JMLR_DEVICE void walk_keys(const Params& p, const Work& work, int first, const QueryTile& queries,
                                      const QueryTile& grads, Ring<kStages>& ring, Sums& dq) {
        Groups groups = groups_of(p.layout, work.head, work.document.length);
        int end = smaller(work.tile + kBlockM, work.document.length);  // of the block's walk
        int own_end = smaller(first + kOwned, end), own_begin = groups.start(first);
        // Key tiles between these positions hold nothing that any of the queries may not see.
        int unmasked = groups.start(own_end - 1) == own_begin ? first + 1 - kKeys : own_begin - 1;

        int tile = groups.start(work.tile);
        for (; tile + kKeys <= own_begin; tile += kKeys) pass(ring);

        Scores scores, grad_weights;
        Weights<Element, kKeys / 8> weights;
        auto begin_tile = [&] {
            full(ring.stage).wait(ring.parity);
            tiles::open_products(scores, grad_weights);
            multiply_rows(scores, queries, keys_of(ring.stage));
            tiles::close_products();
            multiply_rows(grad_weights, grads, values_of(ring.stage));
            tiles::close_products();
        };
        begin_tile();
        Statistics statistics = statistics_of_rows(p, work, first, grads);
        int before = -1;  // the stage whose product with dS is under way
        for (;;) {
            tiles::wait_products<1>(scores, dq);
            if (before >= 0) release(before);
            JMLR_UNROLL
            for (int n = 0; n < kKeys / 8; ++n) {
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) {
                    scores[n][i] =
                        tiles::exp2_approximate(scores[n][i] * p.scale_log2 - statistics.log_sum[i / 2]);
                }
            }
            tiles::wait_products<0>(grad_weights);
            JMLR_UNROLL
            for (int n = 0; n < kKeys / 8; ++n) {
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) scores[n][i] *= grad_weights[n][i] - statistics.delta[i / 2];
            }
            if (tile < own_begin || tile > unmasked) mask(scores, groups, first, tile);
            weights.take(scores);
            tiles::open_products(dq);
            weights.multiply(dq, keys_of(ring.stage));
            tiles::close_products();
            before = ring.stage;
            ring.advance();
            tile += kKeys;
            if (tile >= own_end) break;
            begin_tile();
        }
        tiles::wait_products<0>(dq);
        release(before);
        for (; tile < end; tile += kKeys) pass(ring);
    }

    // The four lanes that share a row of the accumulators sum up its products of grad_out and out.
    static JMLR_DEVICE Statistics statistics_of_rows(const Params& p, const Work& work, int first,
                                                     const QueryTile& grads) {
        constexpr int kPerChunk = QueryTile::Panel::kPerChunk, kTurns = kBlockD / (4 * kPerChunk);
        struct Elements {
            Element element[kPerChunk];
        };
        Statistics statistics;
        const Document& document = work.document;
        int64_t at = statistics_of(p.layout, document, work.head);
        int row = tiles::warp() % tiles::kWarpgroupWarps * 16, column = tiles::lane() % 4 * kPerChunk;
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int tile_row = row + tiles::accumulator_row(2 * half), position = first + tile_row;
            bool inside = position < document.length;
            const Element* out = p.out.data + document.batch * p.out.batch_stride +
                                 int64_t(document.first + position) * p.out.token_stride +
                                 work.head * p.out.head_stride;
            tiles::Chunk theirs[kTurns];
            JMLR_UNROLL
            for (int turn = 0; turn < kTurns; ++turn) {
                int from = column + 4 * turn * kPerChunk;
                theirs[turn] = inside && from < p.head_dim
                                   ? tiles::load(reinterpret_cast<const tiles::Chunk*>(out + from))
                                   : tiles::Chunk{};
            }
            statistics.log_sum[half] =
                inside ? tiles::load(p.lse + at + position) * tiles::kLog2E : tiles::kInfinity;
            float sum = 0;
            JMLR_UNROLL
            for (int turn = 0; turn < kTurns; ++turn) {
                auto x = tiles::bit_cast<Elements>(theirs[turn]);
                auto y = tiles::bit_cast<Elements>(
                    grads.at(tile_row, column + 4 * turn * kPerChunk).template as<tiles::Chunk>().read());
                JMLR_UNROLL
                for (int j = 0; j < kPerChunk; ++j)
                    sum += tiles::to_float(x.element[j]) * tiles::to_float(y.element[j]);
            }
            statistics.delta[half] = tiles::row_sum(sum);
            if (tiles::lane() % 4 == 0 && inside) tiles::store(p.delta + at + position, statistics.delta[half]);
        }
        return statistics;
    }

    // dS is zero where a query may not attend, whatever it was computed from.
    static JMLR_DEVICE void mask(Scores& weights, const Groups& groups, int first, int key) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int position =
                first + tiles::warp() % tiles::kWarpgroupWarps * 16 + tiles::accumulator_row(2 * half);
            int start = groups.start(position);
            JMLR_UNROLL
            for (int n = 0; n < kKeys / 8; ++n) {
                JMLR_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    int key_position = key + 8 * n + tiles::accumulator_column(i);
                    bool attends = key_position >= start && key_position <= position;
                    weights[n][i] = attends ? weights[n][i] : 0;
                }
            }
        }
    }
};

}  // namespace jmlr::shifted_attention::sm90
