// c = a b^T out of the primitives of csrc/tiles/hopper.h: a warpgroup that copies, two that multiply. It has faults to
// order, for the emulator to find.
#pragma once

#include "../../csrc/tiles/hopper.h"
#include "../../csrc/tiles/launch.h"

namespace host_build {

enum HopperFault {
    kNoHopperFault,
    kNoWaitForCopies,
    kTooFewBytes,
    kTooManyBytes,
    kTooManyArrivals,
    kInitTwice,
    kNoSyncAfterInit,
    kNoFenceAfterInit,
    kBoxMisaligned,
    kWrongParity,
    kAccumulatorTouched,
    kAccumulatorNotNamed,
    kAccumulatorEarly,
    kNotOpened,
    kNotClosed,
    kDifferentProducts,
    kNamedBarrierForMore,
    kNamedBarrierForOthers,
    kRegistersNotGiven,
    kRegistersDiffer,
    kRegistersOfANewlyWritten,
    kCopyAfterTheLast,
    kStoresNotAwaited,
    kStoreOfTooManyAxes,
    kWriteWhileCopying,
    kOutsideShared,
    kNoWaitForEmpty,
    kEmptyTooEarly,
    kWaitOfOneLane,
    kNoSyncWarp,
    kNoFenceAsync,
    kNoSyncBeforeStore,
    kWriteWhileStoring,
    kBarrierOverwritten,
    kFenceAfterSync,
};

template <class Element, tiles::Major kA, tiles::Major kB, int kN, bool kFromRegisters>
struct HopperProduct {
    static constexpr int kThreads = 384, kMinBlocks = 1;
    static constexpr int kRows = 128, kStages = 2;
    static constexpr int kStep = 128 / int(sizeof(Element)), kDepth = 32 / int(sizeof(Element));
    static constexpr bool kInnerA = kA == tiles::Major::inner, kInnerB = kB == tiles::Major::inner;
    static constexpr int kColumnsB = kInnerB ? kN : (kN + 63) / 64 * 64, kColumnsOut = (kN + 31) / 32 * 32;

    using TileA =
        std::conditional_t<kInnerA, tiles::Panels<Element, kRows, kStep>, tiles::Panels<Element, kStep, kRows>>;
    using TileB =
        std::conditional_t<kInnerB, tiles::Panels<Element, kN, kStep>, tiles::Panels<Element, kStep, kColumnsB>>;
    using Out = tiles::Panels<float, 64, kColumnsOut>;
    static constexpr int kBytesA = TileA::kBytes, kStage = kBytesA + (TileB::kBytes + 1023) / 1024 * 1024;
    static constexpr int kOut = kStages * kStage, kBarriers = kOut + 2 * Out::kBytes;
    static constexpr int kSharedBytes = kBarriers + 16 * kStages;

    struct Params {
        tiles::TensorMap a, b, c;  // [batch, rows, depth] (outer: [batch, depth, rows]), and so on
        int64_t rows, columns, depth, batches;
        HopperFault fault;
    };

    static JMLR_DEVICE tiles::Barrier full(int stage) { return tiles::Barrier(kBarriers + stage * 16); }
    static JMLR_DEVICE tiles::Barrier empty(int stage) { return tiles::Barrier(kBarriers + stage * 16 + 8); }

    struct Item {
        int row, column, batch;
        JMLR_DEVICE Item(const Params& p, int64_t number) {
            int64_t across = tiles::ceil_div<int64_t>(p.columns, kN), down = tiles::ceil_div<int64_t>(p.rows, kRows);
            column = int(number % across) * kN;
            row = int(number / across % down) * kRows;
            batch = int(number / across / down);
        }
    };

    static JMLR_DEVICE int64_t items(const Params& p) {
        return tiles::ceil_div<int64_t>(p.columns, kN) * tiles::ceil_div<int64_t>(p.rows, kRows) * p.batches;
    }

    static JMLR_DEVICE void run(const Params& p) {
        int warpgroup = tiles::warp() / 4;
        if (tiles::thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) full(stage).init(1), empty(stage).init(8);
            if (p.fault == kInitTwice) full(0).init(1);
            if (p.fault != kNoFenceAfterInit) tiles::fence_barriers();
        }
        if (p.fault != kNoSyncAfterInit) tiles::sync_block();
        if (warpgroup == 2) {
            if (p.fault != kRegistersNotGiven) tiles::give_registers<24>();
            if (tiles::thread_index() == 256) produce(p);
        } else {
            if (p.fault == kRegistersDiffer && tiles::warp() == 3) tiles::take_registers<232>();
            else tiles::take_registers<240>();
            consume(p, warpgroup);
        }
    }

    static JMLR_DEVICE void produce(const Params& p) {
        tiles::Ring<kStages> ring;
        int64_t extra = p.fault == kCopyAfterTheLast ? kStep : 0;
        for (int64_t number = tiles::block_index(); number < items(p); number += tiles::block_count()) {
            Item item(p, number);
            for (int64_t k = 0; k < p.depth + extra; k += kStep) {
                if (p.fault != kNoWaitForEmpty) empty(ring.stage).wait(ring.parity ^ 1);
                int bytes = kBytesA + TileB::kBytes;
                if (p.fault == kTooFewBytes) bytes -= 16;
                if (p.fault == kTooManyBytes) bytes += 16;
                full(ring.stage).arrive_expecting(bytes);
                if (p.fault == kTooManyArrivals) full(ring.stage).arrive();
                fill<kInnerA, TileA>(ring.stage * kStage + (p.fault == kBoxMisaligned ? 128 : 0), p.a, ring.stage,
                                     item.row, int(k), item.batch);
                int at_b = p.fault == kOutsideShared ? 227 * 1024 : ring.stage * kStage + kBytesA;
                fill<kInnerB, TileB>(at_b, p.b, ring.stage, item.column, int(k), item.batch);
                if (p.fault == kWriteWhileCopying) tiles::shared_memory<float>(ring.stage * kStage).write(0, 0.0f);
                ring.advance();
            }
        }
    }

    template <bool kInner, class Tile>
    static JMLR_DEVICE void fill(int offset, const tiles::TensorMap& map, int stage, int first, int k, int batch) {
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
            int across = panel * Tile::kPanelColumns;
            tiles::copy_box(offset + panel * Tile::kPanelBytes, map, full(stage), (kInner ? k : first) + across,
                            kInner ? first : k, batch);
        }
    }

    static JMLR_DEVICE void consume(const Params& p, int warpgroup) {
        float c[kN / 8][4];
        tiles::Ring<kStages> ring;
        for (int64_t number = tiles::block_index(); number < items(p); number += tiles::block_count()) {
            Item item(p, number);
            for (int64_t k = 0; k < p.depth; k += kStep) {
                bool waits = p.fault != kNoWaitForCopies && (p.fault != kWaitOfOneLane || tiles::lane() == 0);
                if (waits) full(ring.stage).wait(ring.parity ^ (p.fault == kWrongParity));
                if (p.fault == kEmptyTooEarly && tiles::lane() == 0) empty(ring.stage).arrive();
                multiply(p, c, warpgroup, ring.stage, k > 0);
                // Only products are known to all lanes without it.
                if (kFromRegisters && p.fault != kNoSyncWarp) tiles::sync_warp();
                if (p.fault != kEmptyTooEarly && tiles::lane() == 0) empty(ring.stage).arrive();
                ring.advance();
            }
            finish(p, c, warpgroup, item);
        }
    }

    static JMLR_DEVICE void multiply(const Params& p, float (&c)[kN / 8][4], int warpgroup, int stage, bool more) {
        TileA a{stage * kStage};
        TileB b{stage * kStage + kBytesA};
        uint32_t registers[kStep / kDepth][4];
        if constexpr (kFromRegisters) {
            JMLR_UNROLL
            for (int k = 0; k < kStep; k += kDepth) load_a(a, warpgroup, k, registers[k / kDepth]);
        }
        if (p.fault != kNotOpened) tiles::open_products(c);
        JMLR_UNROLL
        for (int k = 0; k < kStep; k += kDepth) {
            int at = p.fault == kDifferentProducts && tiles::warp() == 1 ? 0 : k;
            uint64_t right = kInnerB ? tiles::inner_matrix(b, 0, at) : outer(b, at, 0);
            if constexpr (kFromRegisters) {
                uint32_t (&taken)[4] = registers[p.fault == kRegistersOfANewlyWritten ? 0 : k / kDepth];
                if (p.fault == kRegistersOfANewlyWritten) taken[0] = uint32_t(k);
                tiles::multiply_async<Element, kB>(c, taken, right, more || k > 0);
            } else {
                uint64_t left = kInnerA ? tiles::inner_matrix(a, warpgroup * 64, at) : outer(a, at, warpgroup * 64);
                tiles::multiply_async<Element, kA, kB>(c, left, right, more || k > 0);
            }
        }
        if (p.fault != kNotClosed) tiles::close_products();
        if (p.fault == kAccumulatorTouched) c[0][1] += 1.0f;
        if (p.fault == kAccumulatorNotNamed) tiles::wait_products<0>();
        else if (p.fault == kAccumulatorEarly) tiles::wait_products<1>(c);
        else tiles::wait_products<0>(c);
    }

    template <class Tile>
    static JMLR_DEVICE uint64_t outer(const Tile& tile, int k, int column) {
        if constexpr (sizeof(Element) == 2) return tiles::outer_matrix(tile, k, column);
        else return 0;
    }

    // The layout of Fragments<Element>::A, 32 bytes of it.
    static JMLR_DEVICE void load_a(const TileA& a, int warpgroup, int k, uint32_t (&to)[4]) {
        constexpr int kEach = 4 / int(sizeof(Element));
        int row = warpgroup * 64 + tiles::warp() % 4 * 16 + tiles::lane() / 4;
        for (int i = 0; i < 4; ++i) {
            int column = k + tiles::lane() % 4 * kEach + i / 2 * 4 * kEach;
            to[i] = a.at(row + i % 2 * 8, column).template as<uint32_t>().read();
        }
    }

    static JMLR_DEVICE void finish(const Params& p, const float (&c)[kN / 8][4], int warpgroup, const Item& item) {
        Out out{kOut + warpgroup * Out::kBytes};
        int lane = tiles::lane(), row = tiles::warp() % 4 * 16 + lane / 4, column = lane % 4 * 2;
        for (int n = 0; n < kColumnsOut / 8; ++n) {
            for (int half = 0; half < 2; ++half) {
                Shared_pair to = out.at(row + half * 8, n * 8 + column).template as<Pair>();
                to.write(0, n < kN / 8 ? Pair{c[n][half * 2], c[n][half * 2 + 1]} : Pair{});
            }
        }
        if (p.fault == kBarrierOverwritten) tiles::shared_memory<float>(kBarriers).write(0, 0.0f);
        if (p.fault != kNoFenceAsync && p.fault != kFenceAfterSync) tiles::fence_async();
        int id = 1 + (p.fault == kNamedBarrierForOthers ? 0 : warpgroup);
        int threads =
            p.fault == kNamedBarrierForMore || (p.fault == kNamedBarrierForOthers && warpgroup == 1) ? 256 : 128;
        if (p.fault != kNoSyncBeforeStore) tiles::sync_threads_of(id, threads);
        if (p.fault == kFenceAfterSync) tiles::fence_async();
        if (tiles::thread_index() % 128 == 0) {
            for (int panel = 0; panel < Out::kPanels; ++panel) {
                int at = out.offset + panel * Out::kPanelBytes, first = item.column + panel * 32;
                if (panel * 32 >= kN) break;
                if (p.fault == kStoreOfTooManyAxes) tiles::store_box(p.c, at, first, 0, item.row, item.batch);
                else tiles::store_box(p.c, at, first, item.row + warpgroup * 64, item.batch);
            }
            tiles::commit_stores();
            if (p.fault == kWriteWhileStoring) tiles::shared_memory<float>(out.offset).write(0, 0.0f);
            if (p.fault != kStoresNotAwaited) tiles::wait_stores<0>();
        }
        tiles::sync_threads_of(1 + warpgroup, 128);
    }

    struct alignas(8) Pair {
        float first, second;
    };
    using Shared_pair = tiles::Shared<Pair>;
};

}  // namespace host_build
