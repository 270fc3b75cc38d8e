// c = a b^T in the smallest kernel that uses every tile primitive; it has faults to order, for the emulator to find.
#pragma once

#include "../../csrc/tiles/fragments.h"
#include "../../csrc/tiles/launch.h"

namespace host_build {

enum Fault {
    kNoFault,
    kNoBarrierAfterLoad,
    kNoBarrierBeforeReuse,
    kNoWait,
    kColumnTooFar,
    kRowTooFar,
    kTwoOwners,
    kDivergentShuffle,
    kBarrierInBranch,
    kUnwrittenShared,
    kMisaligned,
    kWriteToInput,
    kOutsideOfArray,  // of a thread's own: for the sanitizers alone
    kDivergentWarp,
};

template <class Element, bool kTransposed>
struct Product {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;
    static constexpr int kRows = 64, kColumns = 32, kStep = 32;

    struct Params {
        const Element* a;  // [rows, depth], or with kTransposed [depth, rows]
        const Element* b;  // [columns, depth], or [depth, columns]
        float* c;          // [rows, columns]
        int64_t rows, columns, depth;
        int64_t stride_a, stride_b;
        bool whole_chunks;
        Fault fault;
    };

    using F = tiles::Fragments<Element>;
    using TileA = std::conditional_t<kTransposed, tiles::SharedTile<Element, kStep, kRows>,
                                     tiles::SharedTile<Element, kRows, kStep>>;
    using TileB = std::conditional_t<kTransposed, tiles::SharedTile<Element, kStep, kColumns>,
                                     tiles::SharedTile<Element, kColumns, kStep>>;
    static constexpr int kSharedBytes = TileA::kBytes + TileB::kBytes;

    static JMLR_DEVICE void run(const Params& p) {
        int64_t tiles_across = tiles::ceil_div<int64_t>(p.columns, kColumns);
        int64_t row0 = tiles::block_index() / tiles_across * kRows,
                column0 = tiles::block_index() % tiles_across * kColumns;
        TileA a(p.fault == kMisaligned ? 8 : 0);
        TileB b(TileA::kBytes);
        float c[kColumns / 8][4] = {};
        for (int64_t k0 = 0; k0 < p.depth; k0 += kStep) {
            if (k0 > 0 && p.fault != kNoBarrierBeforeReuse) tiles::sync_block();
            fill(a, p.a, p.stride_a, row0, p.rows + (p.fault == kRowTooFar), k0, p);
            fill(b, p.b, p.stride_b, column0, p.columns, k0, p);
            if (p.fault != kUnwrittenShared) tiles::commit_copies();
            if (p.fault != kNoWait) tiles::wait_copies<0>();
            if (p.fault != kNoBarrierAfterLoad && (p.fault != kBarrierInBranch || tiles::warp() > 0))
                tiles::sync_block();
            JMLR_UNROLL
            for (int k = 0; k < kStep; k += F::kDepth) {
                typename F::A left;
                if constexpr (kTransposed) left = F::load_a_transposed(a, tiles::warp() * 16, k);
                else left = F::load_a(a, tiles::warp() * 16, k);
                JMLR_UNROLL
                for (int n = 0; n < kColumns / 16; ++n) {
                    typename F::BPair right;
                    if constexpr (kTransposed) right = F::load_b_transposed(b, n * 16, k);
                    else right = F::load_b(b, n * 16, k);
                    F::multiply(c[2 * n], left, right.b[0]);
                    F::multiply(c[2 * n + 1], left, right.b[1]);
                }
            }
        }
        if (p.fault == kDivergentWarp && tiles::lane() == 3) row0 += tiles::warp();
        if (p.fault == kDivergentShuffle && tiles::lane() == 3) return;
#if defined(JMLR_HOST_BUILD)
        if (p.fault == kOutsideOfArray) c[0][p.depth] = 0.0f;
#endif
        float row_sums = tiles::row_sum(0.0f);  // all lanes meet here
        JMLR_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) {
                int64_t row = row0 + tiles::warp() * 16 + tiles::accumulator_row(i);
                int64_t column = column0 + n * 8 + tiles::accumulator_column(i);
                if (row >= p.rows || column >= p.columns + (p.fault == kColumnTooFar)) continue;
                float* to = p.fault == kTwoOwners ? p.c : p.c + row * p.columns + column;
                if (p.fault == kWriteToInput) to = reinterpret_cast<float*>(const_cast<Element*>(p.a));
                tiles::store(to, c[n][i] + row_sums);
            }
        }
    }

    template <class Tile>
    static JMLR_DEVICE void fill(const Tile& tile, const Element* from, int64_t stride, int64_t first, int64_t count,
                                 int64_t k0, const Params& p) {
        if constexpr (kTransposed) {
            tile.template fill<kThreads>(
                [&](int k) { return k0 + k < p.depth ? from + (k0 + k) * stride + first : nullptr; },
                int(tiles::smaller<int64_t>(count - first, Tile::kColumns)), p.whole_chunks);
        } else {
            tile.template fill<kThreads>(
                [&](int row) { return first + row < count ? from + (first + row) * stride + k0 : nullptr; },
                int(tiles::smaller<int64_t>(p.depth - k0, Tile::kColumns)), p.whole_chunks);
        }
    }
};

template <class Element, bool kTransposed>
void product(const typename Product<Element, kTransposed>::Params& p) {
    using Kernel = Product<Element, kTransposed>;
    int64_t blocks =
        tiles::ceil_div<int64_t>(p.rows, Kernel::kRows) * tiles::ceil_div<int64_t>(p.columns, Kernel::kColumns);
    tiles::launch<Kernel>(p, blocks, nullptr);
}

}  // namespace host_build
