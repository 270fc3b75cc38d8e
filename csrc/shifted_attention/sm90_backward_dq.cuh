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
    static constexpr int kBlockM = kOwned * kTiles.warpgroups, kKeys = kTiles.streamed;
    static_assert(kTiles.carry, "there are registers enough");

    using Params = BackwardMaps<Element>;
    using Memory =
        BackwardMemory<Element, panels_of(kBlockD), kTiles.warpgroups, kKeys, kTiles.stages, kTiles.buffers, 0>;
    using QueryTile = typename Memory::OwnTile;
    using StageRing = typename Memory::StageRing;
    using Scores = float[kKeys / 8][4];
    using Sums = float[kBlockD / 8][4];
    static constexpr int kThreads = Memory::kThreads, kMinBlocks = 1, kSharedBytes = Memory::kBytes;

    static JMLR_DEVICE void run(const Params& p) {
        int warp = tiles::warp(), warpgroup = warp / tiles::kWarpgroupWarps;
        Memory::open(1);
        if (warpgroup == kTiles.warpgroups) {
            tiles::give_registers<kBackwardProducerRegisters>();
            if (warp % tiles::kWarpgroupWarps == 0) produce(p);
        } else {
            tiles::take_registers<backward_registers(kTiles.warpgroups)>();
            consume(p, warpgroup);
        }
    }

private:
    static JMLR_DEVICE void produce(const Params& p) {
        const Layout& layout = p.plain.layout;
        Producer<Memory> producer;
        for (int64_t item = tiles::block_index(); item < p.items; item += tiles::block_count()) {
            Work work = work_of<kBlockM, true>(layout, int(item), layout.heads);
            const Document& document = work.document;
            if (work.tile >= document.owned) continue;
            producer.bring_own(p.q, p.grad_out, work);
            int end = smaller(work.tile + kBlockM, document.length);
            int begin = groups_of(layout, work.head, document.length).start(work.tile);
            for (int tile = begin; tile < end; tile += kKeys) {
                producer.template bring<1>(p.k, p.v, layout, document, work.head / layout.ratio, tile);
            }
        }
        producer.bring_own(p.q, p.grad_out, no_work());
    }

    static JMLR_DEVICE void consume(const Params& p, int warpgroup) {
        StageRing ring;
        for (typename Memory::OwnRing own;; own.advance()) {
            int slot = Memory::slot(warpgroup, own.stage);
            Memory::own_full(slot).wait(own.parity);
            Work work = read_work(Memory::work_at(slot));
            if (work.head < 0) return;
            int first = work.tile + warpgroup * kOwned;
            work_on(p, work, first, slot, 1 + warpgroup, ring);
            tiles::sync_threads_of(1 + warpgroup, tiles::kWarpgroup);
            if (is_first_of_warpgroup()) {
                tiles::wait_stores<0>();
                Memory::own_empty(slot).arrive();
            }
        }
    }

    static JMLR_DEVICE void work_on(const Params& p, const Work& work, int first, int slot, int id, StageRing& ring) {
        const Document& document = work.document;
        if (first >= document.length) {
            int begin = groups_of(p.plain.layout, work.head, document.length).start(work.tile);
            for (int tile = begin; tile < document.length; tile += kKeys) pass(ring);
            store_zeros<QueryTile>(p.plain.dq, document, work.head, first, p.plain.head_dim);
            return;
        }
        Sums dq = {};
        walk_keys(p, work, first, slot, ring, dq);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) {
            bool inside = first + own_row(i) < document.length;
            JMLR_UNROLL
            for (int n = 0; n < kBlockD / 8; ++n) dq[n][i] = inside ? dq[n][i] * p.plain.scale : 0;
        }
        tiles::sync_threads_of(id, tiles::kWarpgroup);  // nobody needs the queries
        store_sums(dq, Memory::template own<0>(slot), p.dq, p.plain.dq, document, work.head, first, p.plain.head_dim,
                   id);
    }

    static JMLR_DEVICE void pass(StageRing& ring) {
        Memory::full(ring.stage).wait(ring.parity);
        release(ring.stage);
        ring.advance();
    }
    static JMLR_DEVICE void release(int stage) {
        if (tiles::lane() == 0) Memory::empty(stage).arrive();
    }

    // Of a lane's rows: lse in base 2, and delta.
    struct Statistics {
        float log_sum[2], delta[2];
    };

    static JMLR_DEVICE void walk_keys(const Params& p, const Work& work, int first, int slot, StageRing& ring,
                                      Sums& dq) {
        using OwnRows = sm90::OwnRows<QueryTile, kBlockD, kTiles.own_in_registers>;
        QueryTile grads_tile = Memory::template own<1>(slot);
        OwnRows queries(Memory::template own<0>(slot)), grads(grads_tile);
        Groups groups = groups_of(p.plain.layout, work.head, work.document.length);
        int end = smaller(work.tile + kBlockM, work.document.length);  // of the block's walk
        int own_end = smaller(first + kOwned, end), own_begin = groups.start(first);
        // Key tiles between these positions hold nothing that any of the queries may not see.
        int unmasked = groups.start(own_end - 1) == own_begin ? first + 1 - kKeys : own_begin - 1;

        int tile = groups.start(work.tile);
        for (; tile + kKeys <= own_begin; tile += kKeys) pass(ring);

        Scores scores, grad_weights;
        Weights<Element, kKeys / 8> weights;
        Statistics statistics;
        int before = -1;  // the stage whose product with dS is under way
        for (; tile < own_end; tile += kKeys) {
            auto keys = Memory::template streamed<0>(ring.stage), values = Memory::template streamed<1>(ring.stage);
            Memory::full(ring.stage).wait(ring.parity);
            tiles::open_products(scores, grad_weights);
            queries.multiply(scores, keys);
            tiles::close_products();
            grads.multiply(grad_weights, values);
            tiles::close_products();

            if (before < 0) statistics = statistics_of_rows(p, work, first, grads_tile);
            tiles::wait_products<1>(scores, dq);
            if (before >= 0) release(before);
            JMLR_UNROLL
            for (int n = 0; n < kKeys / 8; ++n) {
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) {
                    scores[n][i] =
                        tiles::exp2_approximate(scores[n][i] * p.plain.scale_log2 - statistics.log_sum[i / 2]);
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
            weights.multiply(dq, keys);
            tiles::close_products();
            before = ring.stage;
            ring.advance();
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
        int64_t at = statistics_of(p.plain.layout, document, work.head);
        int column = tiles::lane() % 4 * kPerChunk;
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int tile_row = own_row(2 * half), position = first + tile_row;
            bool inside = position < document.length;
            const Element* out = p.plain.out.data + document.batch * p.plain.out.batch_stride +
                                 int64_t(document.first + position) * p.plain.out.token_stride +
                                 work.head * p.plain.out.head_stride;
            tiles::Chunk theirs[kTurns];
            JMLR_UNROLL
            for (int turn = 0; turn < kTurns; ++turn) {
                int from = column + 4 * turn * kPerChunk;
                theirs[turn] = inside && from < p.plain.head_dim
                                   ? tiles::load(reinterpret_cast<const tiles::Chunk*>(out + from))
                                   : tiles::Chunk{};
            }
            statistics.log_sum[half] =
                inside ? tiles::load(p.plain.lse + at + position) * tiles::kLog2E : tiles::kInfinity;
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
            if (tiles::lane() % 4 == 0 && inside) tiles::store(p.plain.delta + at + position, statistics.delta[half]);
        }
        return statistics;
    }

    // dS is zero where a query may not attend, whatever it was computed from.
    static JMLR_DEVICE void mask(Scores& weights, const Groups& groups, int first, int key) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int position = first + own_row(2 * half);
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
