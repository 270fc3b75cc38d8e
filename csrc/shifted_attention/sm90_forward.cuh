// Forward pass on compute capability 9.0: the sums of forward.cuh, with FlashAttention-3's division of labour (Shah et
// al., arXiv 2407.08608).
//
// Blocks are persistent. One thread of a block, the producer, runs ahead and fills rings of key and value tiles;
// warpgroups of consumers own 64 queries each and walk the tiles from the diagonal back to their group's first key.
// While a warpgroup takes exponentials of a tile's scores, the tensor cores multiply the weights of the tile before
// with its values, and compute the scores of other warpgroups. docs/hopper.md has the arithmetic.
#pragma once

#include "sm90_softmax.h"
#include "sm90_tiles.h"
#include "sm90_warpgroup.h"

namespace jmlr::shifted_attention::sm90 {

template <class Element>
struct ForwardParams {
    Layout layout;
    TensorMap q, k, v, out;
    Rows<Element> out_rows;
    float* lse;
    int items, head_dim;
    float scale_log2;
};

// kCluster_ blocks work side by side on heads that share a kv head: each copies its part of every tile of keys and
// values to all of them.
template <class Element, int kBlockD, int kCluster_>
struct Forward {
    static constexpr int kCluster = kCluster_;
    static constexpr ForwardTiles kTiles = forward_tiles(kBlockD);
    static constexpr int kWarpgroups = kTiles.warpgroups, kStages = kTiles.stages;
    static constexpr int kBlockM = kOwned * kWarpgroups, kBlockN = kTiles.keys;
    static constexpr int kConsumers = kWarpgroups * tiles::kWarpgroup;
    static constexpr int kThreads = kConsumers + tiles::kWarpgroup, kMinBlocks = 1;

    using Params = ForwardParams<Element>;
    using OwnTile = Panels<Element, kOwned, panels_of(kBlockD)>;  // of a warpgroup's queries, and of their output
    using KeyTile = Panels<Element, kBlockN, panels_of(kBlockD)>;
    using Ring = tiles::Ring<kStages>;
    template <int kKeys>
    using Scores = float[kKeys / 8][4];
    using Sums = float[kBlockD / 8][4];
    using Weights = sm90::Weights<Element, kBlockN / 8>;

    // Slots of shared memory, each with a barrier for "full" and one for "empty".
    static constexpr int kQuerySlot = 0, kKeySlots = 1, kValueSlots = 1 + kStages, kSlots = 1 + 2 * kStages;
    static constexpr int kQueries = 0, kOutput = kTiles.own_output ? kWarpgroups * OwnTile::kBytes : 0;
    static constexpr int kKeys = kOutput + kWarpgroups * OwnTile::kBytes, kValues = kKeys + kStages * KeyTile::kBytes;
    static constexpr int kWork = kValues + kStages * KeyTile::kBytes, kBarriers = kWork + kWorkBytes;
    static constexpr int kSharedBytes = kBarriers + 16 * kSlots;
    static_assert(kSharedBytes <= tiles::kSharedOfHopper);
    static_assert(kBlockN % (8 * kCluster) == 0);
    static_assert(kBlockN % 32 == 0, "half of a tile's keys are whole products");
    static_assert(kStages >= 2, "values are waited for while those of the tile before are in use");

    static JMLR_DEVICE void run(const Params& p) {
        if (tiles::thread_index() == 0) {
            for (int slot = 0; slot < kSlots; ++slot) {
                full(slot).init(1);
                empty(slot).init(kConsumers / tiles::kWarp * (slot == kQuerySlot ? 1 : kCluster));
            }
            tiles::fence_barriers();
        }
        sync_all();
        int warpgroup = tiles::warp() / tiles::kWarpgroupWarps;
        if (warpgroup == kWarpgroups) {
            tiles::give_registers<producer_registers(kWarpgroups)>();
            if (tiles::thread_index() == kConsumers) produce(p);
        } else {
            tiles::take_registers<consumer_registers(kWarpgroups)>();
            consume(p, warpgroup);
        }
        if (kCluster > 1) sync_all();  // others may still arrive at this block's barriers
    }

private:
    static JMLR_DEVICE void sync_all() {
        if constexpr (kCluster > 1) {
            tiles::sync_cluster();
        } else {
            tiles::sync_block();
        }
    }

    static JMLR_DEVICE Barrier full(int slot) { return Barrier(kBarriers + 16 * slot); }
    static JMLR_DEVICE Barrier empty(int slot) { return Barrier(kBarriers + 16 * slot + 8); }
    static JMLR_DEVICE OwnTile query_tile(int warpgroup) { return {kQueries + warpgroup * OwnTile::kBytes}; }
    static JMLR_DEVICE OwnTile output_tile(int warpgroup) { return {kOutput + warpgroup * OwnTile::kBytes}; }
    static JMLR_DEVICE KeyTile key_tile(int stage) { return {kKeys + stage * KeyTile::kBytes}; }
    static JMLR_DEVICE KeyTile value_tile(int stage) { return {kValues + stage * KeyTile::kBytes}; }

    // The key tiles of a block's queries: tile n starts at position begin + n * kBlockN.
    struct Walk {
        int begin, tiles;

        JMLR_DEVICE Walk(const Work& work, const Groups& groups) : begin(groups.start(work.tile)) {
            int end = smaller(work.tile + kBlockM, groups.length);
            tiles = work.tile < groups.length ? ceil_div(end - begin, kBlockN) : 0;
        }
        JMLR_DEVICE int tile(int n) const { return begin + n * kBlockN; }
    };

    static JMLR_DEVICE void produce(const Params& p) {
        tiles::prefetch_map(p.q), tiles::prefetch_map(p.k), tiles::prefetch_map(p.v), tiles::prefetch_map(p.out);
        Ring keys, values;
        int parity = 1;
        int rank = kCluster > 1 ? tiles::cluster_rank() : 0;
        for (int64_t item = tiles::block_index() / kCluster; item < p.items; item += tiles::block_count() / kCluster) {
            Work work = work_of<kBlockM, true>(p.layout, int(item), p.layout.heads / kCluster);
            work.head = work.head * kCluster + rank;
            if (work.tile >= work.document.owned) continue;
            Walk walk(work, groups_of(p.layout, work.head, work.document.length));
            int kv_head = work.head / p.layout.ratio;

            empty(kQuerySlot).wait(parity);
            parity ^= 1;
            write_work(kWork, work);
            if (walk.tiles == 0) {
                full(kQuerySlot).arrive();
                continue;
            }
            full(kQuerySlot).arrive_expecting(kWarpgroups * OwnTile::kBytes);
            for (int w = 0; w < kWarpgroups; ++w)
                copy_rows(query_tile(w), p.q, full(kQuerySlot), work.document, work.head, work.tile + kOwned * w);

            auto load = [&](Ring& ring, int slots, const KeyTile& to, const TensorMap& from, int n) {
                int slot = slots + ring.stage;
                empty(slot).wait(ring.parity ^ 1);
                full(slot).arrive_expecting(KeyTile::kBytes);
                copy_rows<kCluster>(to, from, full(slot), work.document, kv_head, walk.tile(n), rank);
                ring.advance();
            };
            // In the order in which they are needed: scores are one tile ahead of the sums.
            for (int n = walk.tiles - 1; n >= -1; --n) {
                if (n >= 0) load(keys, kKeySlots, key_tile(keys.stage), p.k, n);
                if (n + 1 < walk.tiles) load(values, kValueSlots, value_tile(values.stage), p.v, n + 1);
            }
        }
        empty(kQuerySlot).wait(parity);
        write_work(kWork, no_work());
        full(kQuerySlot).arrive();
    }

    static JMLR_DEVICE void consume(const Params& p, int warpgroup) {
        Ring keys, values;
        if (warpgroup == kWarpgroups - 1) pass_turn(warpgroup);
        for (int parity = 0;; parity ^= 1) {
            full(kQuerySlot).wait(parity);
            Work work = read_work(kWork);
            if (work.head < 0) break;
            Groups groups = groups_of(p.layout, work.head, work.document.length);
            Sums out = {};
            Softmax softmax;
            attend(p, work, groups, warpgroup, keys, values, out, softmax);
            finish(p, work, warpgroup, out, softmax);
        }
        if (warpgroup == 0) take_turn(warpgroup);
        if (is_first_of_warpgroup()) tiles::wait_stores<0>();
    }

    // A warp no longer needs a slot.
    static JMLR_DEVICE void release(int slot) {
        if (tiles::lane() == 0) empty(slot).arrive();
    }
    static JMLR_DEVICE void release(int slots, Ring& ring) {
        if constexpr (kCluster == 1) {
            release(slots + ring.stage);
        } else if (tiles::lane() == 0) {
            for (int block = 0; block < kCluster; ++block) empty(slots + ring.stage).arrive_at(block);
        }
        ring.advance();
    }

    // Numbers of the barriers that only some threads of a block take part in.
    enum Named { kCleared = 1, kStaged, kTurns = kStaged + kWarpgroups };

    // Warpgroups issue their products in turns, one for each tile of the block, so that the softmax of one runs beside
    // the products of the others.
    static JMLR_DEVICE void take_turn(int warpgroup) {
        if constexpr (kTiles.take_turns) tiles::sync_threads_of(kTurns + warpgroup, 2 * tiles::kWarpgroup);
    }
    static JMLR_DEVICE void pass_turn(int warpgroup) {
        int next = warpgroup + 1 < kWarpgroups ? warpgroup + 1 : 0;
        if constexpr (kTiles.take_turns) tiles::arrive_for(kTurns + next, 2 * tiles::kWarpgroup);
    }

    // What a warpgroup's queries may see: tiles last - 1 down to first of the walk.
    struct Share {
        int row, first = 0, last = 0, keys_of_last = 0;
        int all_start;  // the latest start of their groups: keys from here on need no mask for it

        JMLR_DEVICE Share(const Work& work, const Groups& groups, const Walk& walk, int warpgroup)
            : row(work.tile + kOwned * warpgroup), all_start(groups.start(row + kOwned - 1)) {
            if (row >= groups.length) return;
            int end = smaller(row + kOwned, groups.length);
            first = (groups.start(row) - walk.begin) / kBlockN;
            last = ceil_div(end - walk.begin, kBlockN);
            keys_of_last = end - walk.tile(last - 1);
        }
    };

    static JMLR_DEVICE void attend(const Params& p, const Work& work, const Groups& groups, int warpgroup, Ring& keys,
                                   Ring& values, Sums& out, Softmax& softmax) {
        Walk walk(work, groups);
        Share share(work, groups, walk, warpgroup);
        if (walk.tiles > 0 && brings_foreign_rows(p.layout, work.document, walk.tile(walk.tiles)))
            clear_values(values, groups.length - walk.tile(walk.tiles - 1));

        for (int n = walk.tiles; n > share.last; --n) pass_over(keys, values, warpgroup);
        if (share.last > share.first) {
            Scores<kBlockN> scores;
            Weights weights;
            float rescale[2];
            // Queries at the beginning of a tile of keys see half of it at most: the other half is left out.
            bool halved = share.keys_of_last <= kBlockN / 2;
            auto first_tile = [&](auto& part) {
                full(kKeySlots + keys.stage).wait(keys.parity);
                take_turn(warpgroup);
                multiply_keys(part, warpgroup, keys.stage);
                pass_turn(warpgroup);
                tiles::wait_products<0>(part);
                release(kKeySlots, keys);
                weigh(p, groups, share, walk.tile(share.last - 1), part, softmax, rescale);
                weights.take(part);
                full(kValueSlots + values.stage).wait(values.parity);
            };
            if (halved) {
                first_tile(reinterpret_cast<Scores<kBlockN / 2>&>(scores));
            } else {
                first_tile(scores);
            }
            for (int n = share.last - 2; n >= share.first; --n) {
                full(kKeySlots + keys.stage).wait(keys.parity);
                take_turn(warpgroup);
                multiply_keys(scores, warpgroup, keys.stage);
                multiply_values(out, weights, values.stage, halved);
                pass_turn(warpgroup);
                halved = false;

                tiles::wait_products<1>(scores);
                release(kKeySlots, keys);
                weigh(p, groups, share, walk.tile(n), scores, softmax, rescale);
                // Here, because the compiler keeps exponentials before a loop, but not before a wait for products.
                Ring next = values;
                next.advance();
                full(kValueSlots + next.stage).wait(next.parity);
                tiles::wait_products<0>(out);
                release(kValueSlots, values);
                JMLR_UNROLL
                for (int i = 0; i < kBlockD / 2; ++i) out[i / 4][i % 4] *= rescale[i % 4 / 2];
                weights.take(scores);
            }
            if constexpr (kTiles.own_output) release(kQuerySlot);
            multiply_values(out, weights, values.stage, halved);
            tiles::wait_products<0>(out);
            release(kValueSlots, values);
        } else if (kTiles.own_output) {
            tiles::sync_warp();
            release(kQuerySlot);
        }
        for (int n = share.first; n > 0 && share.last > share.first; --n) pass_over(keys, values, warpgroup);
    }

    // A tile that none of a warpgroup's queries sees. It is waited for all the same, lest "empty" be said too early.
    static JMLR_DEVICE void pass_over(Ring& keys, Ring& values, int warpgroup) {
        take_turn(warpgroup);
        pass_turn(warpgroup);
        full(kKeySlots + keys.stage).wait(keys.parity);
        release(kKeySlots, keys);
        full(kValueSlots + values.stage).wait(values.parity);
        release(kValueSlots, values);
    }

    // The next tile of values gets zeros from a row on: weights of zero do not make zeros of infinities.
    static JMLR_DEVICE void clear_values(const Ring& values, int row) {
        full(kValueSlots + values.stage).wait(values.parity);
        clear_rows(value_tile(values.stage), row, tiles::thread_index(), kConsumers);
        tiles::fence_async();
        tiles::sync_threads_of(kCleared, kConsumers);
    }

    template <int kColumns>
    static JMLR_DEVICE void multiply_keys(float (&scores)[kColumns][4], int warpgroup, int stage) {
        tiles::open_products(scores);
        multiply_rows<kBlockD>(scores, query_tile(warpgroup), key_tile(stage));
        tiles::close_products();
    }

    // The branches are whole groups of products, or the compiler would put fences between these.
    static JMLR_DEVICE void multiply_values(Sums& out, const Weights& weights, int stage, bool halved) {
        if (halved) {
            tiles::open_products(out);
            weights.template multiply<kBlockN / 16>(out, value_tile(stage));
            tiles::close_products();
        } else {
            tiles::open_products(out);
            weights.multiply(out, value_tile(stage));
            tiles::close_products();
        }
    }

    // Scores of the tile of keys at position `key` become weights.
    template <int kColumns>
    static JMLR_DEVICE void weigh(const Params& p, const Groups& groups, const Share& share, int key,
                                  float (&scores)[kColumns][4], Softmax& softmax, float (&rescale)[2]) {
        float factor = p.scale_log2;
        // Maxima are taken before the scale, so one that is not positive must be multiplied in first.
        if (factor <= 0) {
            JMLR_UNROLL
            for (int i = 0; i < 4 * kColumns; ++i) scores[i / 4][i % 4] *= factor;
            factor = 1;
        }
        hide_others(scores, groups, share.row, own_row(0), share.all_start, key);
        softmax.take(scores, factor, rescale);
    }

    static JMLR_DEVICE void finish(const Params& p, const Work& work, int warpgroup, Sums& out,
                                   const Softmax& softmax) {
        const Document& document = work.document;
        int row = work.tile + kOwned * warpgroup;
        float* lse = p.lse + (int64_t(document.batch) * p.layout.heads + work.head) * p.layout.rows + document.first;
        JMLR_UNROLL
        for (int half = 0; half < 2; ++half) {
            int position = row + own_row(2 * half);
            bool inside = position < document.length;
            float total = tiles::row_sum(softmax.total[half]), inverse = 1 / total;
            JMLR_UNROLL
            for (int n = 0; n < kBlockD / 8; ++n) {
                JMLR_UNROLL
                for (int i = 2 * half; i < 2 * half + 2; ++i) out[n][i] = inside ? out[n][i] * inverse : 0;
            }
            if (tiles::lane() % 4 == 0 && position < document.owned) {
                float log_sum = (softmax.largest[half] + tiles::log2_accurate(total)) * tiles::kLn2;
                tiles::store(lse + position, inside ? log_sum : tiles::kInfinity);
            }
        }
        if (kTiles.own_output) free_output(warpgroup);
        if (row < document.owned) {
            store_sums(out, output_tile(warpgroup), p.out, p.out_rows, document, work.head, row, p.head_dim,
                       kStaged + warpgroup);
        }
        if (!kTiles.own_output) {
            free_output(warpgroup);
            release(kQuerySlot);
        }
    }

    // Until what the warpgroup stored last has left shared memory.
    static JMLR_DEVICE void free_output(int warpgroup) {
        if (is_first_of_warpgroup()) tiles::wait_stores<0>();
        tiles::sync_threads_of(kStaged + warpgroup, tiles::kWarpgroup);
    }
};

template <class Kernel, class Element>
void launch_forward(const ForwardProblem& problem, int processors, void* stream) {
    Layout layout = layout_of(problem);
    int64_t items = blocks_of(layout, problem.heads / Kernel::kCluster, Kernel::kBlockM);
    int64_t blocks = persistent_blocks(items, processors / Kernel::kCluster) * Kernel::kCluster;
    auto map = [&](const Input& input, int64_t heads, int rows) {
        return map_of<Element>(input, problem, heads, rows);
    };
    typename Kernel::Params params{layout,
                                   map(problem.q, problem.heads, kOwned),
                                   map(problem.k, problem.kv_heads, Kernel::kBlockN / Kernel::kCluster),
                                   map(problem.v, problem.kv_heads, Kernel::kBlockN / Kernel::kCluster),
                                   map(contiguous_input(problem.out, problem, problem.heads), problem.heads, kOwned),
                                   contiguous_rows(static_cast<Element*>(problem.out), problem, problem.heads),
                                   problem.lse,
                                   int(items),
                                   int(problem.head_dim),
                                   float(problem.scale * kLog2E)};
    tiles::launch<Kernel>(params, blocks, stream);
}

template <class Element, int kBlockD>
void forward_of_width(const ForwardProblem& problem, int processors, void* stream) {
    // Neighbours share a kv head, and are both shifted or neither is.
    bool pairs = problem.heads / problem.kv_heads % 2 == 0 && problem.heads / 2 % 2 == 0 && processors >= 2;
    if (pairs && forward_tiles(kBlockD).pair_heads) {
        launch_forward<Forward<Element, kBlockD, 2>, Element>(problem, processors, stream);
    } else {
        launch_forward<Forward<Element, kBlockD, 1>, Element>(problem, processors, stream);
    }
}

template <class Element>
void forward_of(const ForwardProblem& problem, int processors, void* stream) {
    switch (block_d_of(problem.head_dim)) {
        case 64:
            return forward_of_width<Element, 64>(problem, processors, stream);
        case 96:
            return forward_of_width<Element, 96>(problem, processors, stream);
        case 128:
            return forward_of_width<Element, 128>(problem, processors, stream);
        default:
            return forward_of_width<Element, 256>(problem, processors, stream);
    }
}

}  // namespace jmlr::shifted_attention::sm90
