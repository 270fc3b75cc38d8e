// dk and dv on compute capability 9.0. A consuming warpgroup owns 64 keys of a kv head. Two producing warps walk the
// query heads that share it, plain and shifted, in order, and for each of them the queries from the keys to the end of
// their group(s): one copies queries and gradients of their outputs, the other brings lse and delta.
//
// Keys are the rows of all products, so that P^T and dS^T stay in registers: accumulators become operands. The
// exponentials run under the products of v grad_out^T, dS under those of dv, and the next k q^T follows without a
// pause.
#pragma once

#include "sm90_backward.cuh"

namespace jmlr::shifted_attention::sm90 {

template <class Element, int kBlockD>
struct BackwardDkDv {
    static constexpr BackwardTiles kTiles = backward_dkdv_tiles(kBlockD);
    static constexpr int kBlockN = kOwned * kTiles.warpgroups, kQueries = kTiles.streamed;
    static_assert(kQueries % tiles::kWarp == 0);

    using Params = BackwardMaps<Element>;
    // Of a stage: lse in base 2 of its queries, then their delta.
    using Memory = BackwardMemory<Element, panels_of(kBlockD), kTiles.warpgroups, kQueries, kTiles.stages,
                                  kTiles.buffers, 2 * kQueries>;
    using KeyTile = typename Memory::OwnTile;
    using StageRing = typename Memory::StageRing;
    using Scores = float[kQueries / 8][4];
    using Sums = float[kBlockD / 8][4];
    static constexpr int kThreads = Memory::kThreads, kMinBlocks = 1, kSharedBytes = Memory::kBytes;

    static JMLR_DEVICE void run(const Params& p) {
        int warp = tiles::warp(), warpgroup = warp / tiles::kWarpgroupWarps;
        Memory::open(2);
        if (warpgroup == kTiles.warpgroups) {
            tiles::give_registers<kBackwardProducerRegisters>();
            if (warp % tiles::kWarpgroupWarps == 0) copy(p);
            if (warp % tiles::kWarpgroupWarps == 1) bring_statistics(p);
        } else {
            tiles::take_registers<backward_registers(kTiles.warpgroups)>();
            consume(p, warpgroup);
        }
    }

private:
    // The tiles of queries that see any of a block's keys: head by head, each from the keys on.
    struct Walk {
        int head, last_head, first, tile, end = 0;

        JMLR_DEVICE Walk(const Layout& layout, const Work& work)
            : head(work.head * layout.ratio), last_head(head + layout.ratio - 1), first(work.tile), tile(first) {
            if (first < work.document.length) {
                find_end(layout, work.document);
            } else {
                head = last_head + 1;
            }
        }
        JMLR_DEVICE bool under_way() const { return head <= last_head; }
        JMLR_DEVICE void advance(const Layout& layout, const Document& document) {
            tile += kQueries;
            if (tile < end) return;
            head += 1;
            tile = first;
            if (under_way()) find_end(layout, document);
        }

    private:
        JMLR_DEVICE void find_end(const Layout& layout, const Document& document) {
            end = groups_of(layout, head, document.length).end(smaller(first + kBlockN, document.length) - 1);
        }
    };

    // Calls `body(work)` for the items of this block.
    template <class Body>
    static JMLR_DEVICE void each_work(const Params& p, Body body) {
        const Layout& layout = p.plain.layout;
        for (int64_t item = tiles::block_index(); item < p.items; item += tiles::block_count()) {
            Work work = work_of<kBlockN, false>(layout, int(item), layout.heads / layout.ratio);
            if (work.tile < work.document.owned) body(work);
        }
    }

    static JMLR_DEVICE void copy(const Params& p) {
        const Layout& layout = p.plain.layout;
        Producer<Memory> producer;
        each_work(p, [&](const Work& work) {
            producer.bring_own(p.k, p.v, work);
            for (Walk walk(layout, work); walk.under_way(); walk.advance(layout, work.document)) {
                producer.template bring<2>(p.q, p.grad_out, layout, work.document, walk.head, walk.tile);
            }
        });
        producer.bring_own(p.k, p.v, no_work());
    }

    static JMLR_DEVICE void bring_statistics(const Params& p) {
        const Layout& layout = p.plain.layout;
        StageRing ring;
        each_work(p, [&](const Work& work) {
            for (Walk walk(layout, work); walk.under_way(); walk.advance(layout, work.document)) {
                constexpr int kTurns = kQueries / tiles::kWarp;
                int64_t at = statistics_of(layout, work.document, walk.head);
                float log_sum[kTurns], delta[kTurns];
                JMLR_UNROLL
                for (int turn = 0; turn < kTurns; ++turn) {
                    int position = walk.tile + turn * tiles::kWarp + tiles::lane();
                    bool inside = position < work.document.length;
                    log_sum[turn] =
                        inside ? tiles::load(p.plain.lse + at + position) * tiles::kLog2E : tiles::kInfinity;
                    delta[turn] = inside ? tiles::load(p.plain.delta + at + position) : 0;
                }
                auto to = tiles::shared_memory<float>(Memory::statistics_at(ring.stage));
                Memory::empty(ring.stage).wait(ring.parity ^ 1);
                JMLR_UNROLL
                for (int turn = 0; turn < kTurns; ++turn) {
                    to.write(turn * tiles::kWarp + tiles::lane(), log_sum[turn]);
                    to.write(kQueries + turn * tiles::kWarp + tiles::lane(), delta[turn]);
                }
                tiles::sync_warp();
                if (tiles::lane() == 0) Memory::full(ring.stage).arrive();
                ring.advance();
            }
        });
    }

    static JMLR_DEVICE void consume(const Params& p, int warpgroup) {
        StageRing ring;
        for (typename Memory::OwnRing own;; own.advance()) {
            int slot = Memory::slot(warpgroup, own.stage);
            Memory::own_full(slot).wait(own.parity);
            Work work = read_work(Memory::work_at(slot));
            if (work.head < 0) return;
            work_on(p, work, work.tile + warpgroup * kOwned, slot, 1 + warpgroup, ring);
            tiles::sync_threads_of(1 + warpgroup, tiles::kWarpgroup);
            if (is_first_of_warpgroup()) {
                tiles::wait_stores<0>();
                Memory::own_empty(slot).arrive();
            }
        }
    }

    static JMLR_DEVICE void work_on(const Params& p, const Work& work, int first, int slot, int id, StageRing& ring) {
        const Document& document = work.document;
        int head_dim = p.plain.head_dim;
        if (first >= document.length) {
            for (Walk walk(p.plain.layout, work); walk.under_way(); walk.advance(p.plain.layout, document)) pass(ring);
            store_zeros<KeyTile>(p.plain.dk, document, work.head, first, head_dim);
            store_zeros<KeyTile>(p.plain.dv, document, work.head, first, head_dim);
            return;
        }
        Sums dk = {}, dv = {};
        walk_queries(p, work, first, slot, ring, dk, dv);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) {
            bool inside = first + own_row(i) < document.length;
            JMLR_UNROLL
            for (int n = 0; n < kBlockD / 8; ++n) {
                dk[n][i] = inside ? dk[n][i] * p.plain.scale : 0;
                dv[n][i] = inside ? dv[n][i] : 0;
            }
        }
        tiles::sync_threads_of(id, tiles::kWarpgroup);  // nobody needs the keys and values
        store_sums(dk, Memory::template own<0>(slot), p.dk, p.plain.dk, document, work.head, first, head_dim, id);
        store_sums(dv, Memory::template own<1>(slot), p.dv, p.plain.dv, document, work.head, first, head_dim, id);
    }

    static JMLR_DEVICE void release(int stage) {
        tiles::sync_warp();  // all lanes have read the statistics
        if (tiles::lane() == 0) Memory::empty(stage).arrive();
    }
    static JMLR_DEVICE void pass(StageRing& ring) {
        Memory::full(ring.stage).wait(ring.parity);
        release(ring.stage);
        ring.advance();
    }

    // Which queries of a head see keys of the warpgroup: those before `end`, and from `full` on all keys.
    struct Seen {
        int full, end;
    };
    static JMLR_DEVICE Seen seen_of(const Layout& layout, const Document& document, int head, int first) {
        int last = smaller(first + kOwned, document.length) - 1;
        Groups groups = groups_of(layout, head, document.length);
        int end = groups.end(last);
        return {groups.end(first) == end ? last : end, end};
    }

    static JMLR_DEVICE void walk_queries(const Params& p, const Work& work, int first, int slot, StageRing& ring,
                                         Sums& dk, Sums& dv) {
        const Layout& layout = p.plain.layout;
        using OwnRows = sm90::OwnRows<KeyTile, kBlockD, kTiles.own_in_registers>;
        OwnRows keys(Memory::template own<0>(slot)), values(Memory::template own<1>(slot));
        Scores weights, grad_weights;
        Weights<Element, kQueries / 8> left, right;
        int before = -1;  // the stage whose product with dS^T is under way
        for (Walk walk(layout, work); walk.under_way(); walk.advance(layout, work.document)) {
            Seen seen = seen_of(layout, work.document, walk.head, first);
            if (walk.tile + kQueries <= first || walk.tile >= seen.end) {
                // Not before the stage is given back, for which the others may be waiting.
                if (before >= 0) {
                    tiles::wait_products<0>(dk);
                    release(before);
                    before = -1;
                }
                pass(ring);
                continue;
            }
            auto queries = Memory::template streamed<0>(ring.stage), grads = Memory::template streamed<1>(ring.stage);
            auto statistics = tiles::shared_memory<Pair>(Memory::statistics_at(ring.stage)) + tiles::lane() % 4;
            Memory::full(ring.stage).wait(ring.parity);
            tiles::open_products(weights, grad_weights);
            keys.multiply(weights, queries);
            tiles::close_products();
            values.multiply(grad_weights, grads);
            tiles::close_products();

            if (kTiles.carry) {
                tiles::wait_products<1>(weights, dk);
                if (before >= 0) release(before);
            } else {
                tiles::wait_products<1>(weights);
            }
            JMLR_UNROLL
            for (int n = 0; n < kQueries / 8; ++n) {
                Pair log_sum = statistics.read(4 * n);
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) {
                    weights[n][i] = tiles::exp2_approximate(weights[n][i] * p.plain.scale_log2 -
                                                            (i % 2 == 0 ? log_sum.first : log_sum.second));
                }
            }
            if (walk.tile < seen.full || walk.tile + kQueries > seen.end) {
                mask(weights, groups_of(layout, walk.head, work.document.length), first, walk.tile);
            }
            left.take(weights);
            tiles::open_products(dv);
            left.multiply(dv, grads);
            tiles::close_products();

            tiles::wait_products<1>(grad_weights);
            JMLR_UNROLL
            for (int n = 0; n < kQueries / 8; ++n) {
                Pair delta = statistics.read(kQueries / 2 + 4 * n);
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i)
                    weights[n][i] *= grad_weights[n][i] - (i % 2 == 0 ? delta.first : delta.second);
            }
            right.take(weights);
            tiles::open_products(dk);
            right.multiply(dk, queries);
            tiles::close_products();
            tiles::wait_products<1>(dv);
            if (kTiles.carry) {
                before = ring.stage;
            } else {
                tiles::wait_products<0>(dk);
                release(ring.stage);
            }
            ring.advance();
        }
        tiles::wait_products<0>(dk);
        if (before >= 0) release(before);
    }

    struct alignas(8) Pair {
        float first, second;
    };

    static JMLR_DEVICE void mask(Scores& weights, const Groups& groups, int first, int query) {
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int key_position = first + own_row(2 * half), key_end = groups.end(key_position);
            JMLR_UNROLL
            for (int n = 0; n < kQueries / 8; ++n) {
                JMLR_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    int position = query + 8 * n + tiles::accumulator_column(i);
                    bool attends = position >= key_position && position < key_end;
                    weights[n][i] = attends ? weights[n][i] : 0;
                }
            }
        }
    }
};

}  // namespace jmlr::shifted_attention::sm90
