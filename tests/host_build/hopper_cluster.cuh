// c = a b^T by clusters of two blocks: each copies one half of b's tile for both. It has faults to order.
#pragma once

#include "../../csrc/tiles/hopper.h"
#include "../../csrc/tiles/launch.h"

namespace host_build {

enum ClusterFault {
    kNoClusterFault,
    kNoArrivalAfar,
    kNoSyncClusterAfterInit,
    kNoSyncClusterAtTheEnd,
    kTooManyBlocks,
    kOwnHalfExpected,
    kNoSuchBlock,
};

struct HopperCluster {
    static constexpr int kThreads = 256, kMinBlocks = 1, kCluster = 2, kStages = 2;
    using Element = tiles::BFloat16;
    using TileA = tiles::Panels<Element, 64, 64>;
    using TileB = tiles::Panels<Element, 64, 64>;
    static constexpr int kHalf = TileB::kBytes / 2, kStage = TileA::kBytes + TileB::kBytes;
    static constexpr int kBarriers = kStages * kStage, kSharedBytes = kBarriers + 16 * kStages;

    struct Params {
        tiles::TensorMap a, b;  // [1, rows, depth] in boxes of 64 rows, [1, columns, depth] in boxes of 32
        float* c;               // [rows, 64]
        int64_t rows, depth;
        ClusterFault fault;
    };

    static JMLR_DEVICE tiles::Barrier full(int stage) { return tiles::Barrier(kBarriers + stage * 16); }
    static JMLR_DEVICE tiles::Barrier empty(int stage) { return tiles::Barrier(kBarriers + stage * 16 + 8); }

    static JMLR_DEVICE void run(const Params& p) {
        int warpgroup = tiles::warp() / 4;
        if (tiles::thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) full(stage).init(1), empty(stage).init(4 * kCluster);
            tiles::fence_barriers();
        }
        if (p.fault == kNoSyncClusterAfterInit) tiles::sync_block();
        else tiles::sync_cluster();
        if (warpgroup == 1) {
            if (tiles::thread_index() == 128) produce(p);
        } else {
            consume(p);
        }
        // The other block may still want to tell this one's barriers.
        if (p.fault != kNoSyncClusterAtTheEnd) tiles::sync_cluster();
    }

    static JMLR_DEVICE void produce(const Params& p) {
        tiles::Ring<kStages> ring;
        int rank = tiles::cluster_rank();
        for (int k = 0; k < p.depth; k += 64) {
            int at = ring.stage * kStage, half = at + TileA::kBytes + rank * kHalf;
            empty(ring.stage).wait(ring.parity ^ 1);
            full(ring.stage).arrive_expecting(TileA::kBytes + (p.fault == kOwnHalfExpected ? kHalf : TileB::kBytes));
            tiles::copy_box(at, p.a, full(ring.stage), k, int(tiles::block_index()) * 64, 0);
            uint16_t blocks = p.fault == kTooManyBlocks ? 7 : 3;
            tiles::copy_box_to_all(blocks, half, p.b, full(ring.stage), k, rank * 32, 0);
            ring.advance();
        }
    }

    static JMLR_DEVICE void consume(const Params& p) {
        float c[8][4];
        tiles::Ring<kStages> ring;
        for (int k = 0; k < p.depth; k += 64) {
            TileA a{ring.stage * kStage};
            TileB b{ring.stage * kStage + TileA::kBytes};
            full(ring.stage).wait(ring.parity);
            tiles::open_products(c);
            JMLR_UNROLL
            for (int step = 0; step < 64; step += 16) {
                tiles::multiply_async<Element, tiles::Major::inner, tiles::Major::inner>(
                    c, tiles::inner_matrix(a, 0, step), tiles::inner_matrix(b, 0, step), k + step > 0);
            }
            tiles::close_products();
            tiles::wait_products<0>(c);
            if (tiles::lane() == 0) {
                for (int rank = 0; rank < tiles::cluster_size(); ++rank) {
                    int to = p.fault == kNoArrivalAfar ? tiles::cluster_rank() : rank;
                    empty(ring.stage).arrive_at(p.fault == kNoSuchBlock ? to + 1 : to);
                }
            }
            ring.advance();
        }
        int lane = tiles::lane(), first = int(tiles::block_index()) * 64 + tiles::warp() * 16 + lane / 4;
        for (int i = 0; i < 32; ++i) {
            int row = first + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (row < p.rows) tiles::store(p.c + int64_t(row) * 64 + column, c[i / 4][i % 4]);
        }
    }
};

}  // namespace host_build
