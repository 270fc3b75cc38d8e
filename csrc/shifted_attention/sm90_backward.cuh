// What both launches of the backward pass for compute capability 9.0 share. The division of the work and its order are
// those of backward.cuh. A block owns a tile of 64 rows for each of its consuming warpgroups, streams the tiles of the
// other side in a ring of stages, and takes one item of the list after the other.
#pragma once

#include "backward.cuh"
#include "sm90_tiles.h"
#include "sm90_warpgroup.h"

namespace jmlr::shifted_attention::sm90 {

using tiles::Ring;

// The arguments of a kernel. `q` and `grad_out` have boxes of the queries that it takes at a time, `k` and `v` of its
// keys, dq, dk and dv of a warpgroup's rows.
template <class Element>
struct BackwardMaps {
    TensorMap grad_out, q, k, v, dq, dk, dv;
    int64_t items;
    shifted_attention::BackwardParams<Element> plain;
};

// The shared memory of a block. Every warpgroup has `kBuffers` pairs of tiles of its own 64 rows, each with the item
// that they are of; the stages of the ring hold a pair of tiles of `kStreamed` rows and `kStatistics` numbers.
template <class Element, int kColumns, int kWarpgroups_, int kStreamed, int kStages_, int kBuffers_, int kStatistics>
struct BackwardMemory {
    static constexpr int kWarpgroups = kWarpgroups_, kStages = kStages_, kBuffers = kBuffers_;
    static constexpr int kThreads = tiles::kWarpgroup * (kWarpgroups + 1);
    using OwnTile = Panels<Element, kOwned, kColumns>;
    using StreamedTile = Panels<Element, kStreamed, kColumns>;
    using OwnRing = Ring<kBuffers>;
    using StageRing = Ring<kStages>;

    static constexpr int kStageBytes = 2 * StreamedTile::kBytes;
    static constexpr int kSlots = kWarpgroups * kBuffers;
    static constexpr int kStagesAt = kSlots * 2 * OwnTile::kBytes;
    static constexpr int kStatisticsAt = kStagesAt + kStages * kStageBytes;
    static constexpr int kWorkAt = kStatisticsAt + kStages * kStatistics * int(sizeof(float));
    static constexpr int kBarriersAt = kWorkAt + kSlots * kWorkBytes;
    static constexpr int kLandedAt = kBarriersAt + 16 * (kStages + kSlots);
    static constexpr int kBytes = kLandedAt + 8;
    static_assert(kBytes <= tiles::kSharedOfHopper);

    static JMLR_DEVICE Barrier full(int stage) { return Barrier(kBarriersAt + 16 * stage); }
    static JMLR_DEVICE Barrier empty(int stage) { return Barrier(kBarriersAt + 16 * stage + 8); }
    template <int kNumber>
    static JMLR_DEVICE StreamedTile streamed(int stage) {
        return {kStagesAt + stage * kStageBytes + kNumber * StreamedTile::kBytes};
    }
    static JMLR_DEVICE int statistics_at(int stage) { return kStatisticsAt + stage * kStatistics * int(sizeof(float)); }

    static JMLR_DEVICE int slot(int warpgroup, int buffer) { return warpgroup * kBuffers + buffer; }
    static JMLR_DEVICE Barrier own_full(int slot) { return full(kStages + slot); }
    static JMLR_DEVICE Barrier own_empty(int slot) { return empty(kStages + slot); }
    static JMLR_DEVICE int work_at(int slot) { return kWorkAt + slot * kWorkBytes; }
    template <int kNumber>
    static JMLR_DEVICE OwnTile own(int slot) {
        return {(2 * slot + kNumber) * OwnTile::kBytes};
    }

    // By all threads. `brought_by` warps fill a stage.
    static JMLR_DEVICE void open(int brought_by) {
        if (tiles::thread_index() == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                full(stage).init(brought_by);
                empty(stage).init(kWarpgroups * tiles::kWarpgroupWarps);
            }
            for (int i = 0; i < kSlots; ++i) own_full(i).init(1), own_empty(i).init(1);
            Barrier(kLandedAt).init(1);
            tiles::fence_barriers();
        }
        tiles::sync_block();
    }
};

// What the warp does that copies.
template <class Memory>
class Producer {
public:
    // Tells the consumers what comes next, and brings the two tiles of rows that they own.
    JMLR_DEVICE void bring_own(const TensorMap& first, const TensorMap& second, const Work& work) {
        JMLR_UNROLL
        for (int w = 0; w < Memory::kWarpgroups; ++w) {
            int slot = Memory::slot(w, own_.stage), row = work.tile + w * kOwned;
            Memory::own_empty(slot).wait(own_.parity ^ 1);
            if (tiles::lane() != 0) continue;
            write_work(Memory::work_at(slot), work);
            Barrier barrier = Memory::own_full(slot);
            if (row < work.document.length) {
                barrier.arrive_expecting(2 * Memory::OwnTile::kBytes);
                copy_rows(Memory::template own<0>(slot), first, barrier, work.document, work.head, row);
                copy_rows(Memory::template own<1>(slot), second, barrier, work.document, work.head, row);
            } else {
                barrier.arrive();
            }
        }
        own_.advance();
    }

    // Rows of the document from `row` on into the next stage. Those that are not the document's meet weights of zero,
    // but zero times NaN is none: where the copies may bring such, the warp waits for them and clears the first
    // kCleared tiles before the consumers hear of the stage.
    template <int kCleared>
    JMLR_DEVICE void bring(const TensorMap& first, const TensorMap& second, const Layout& layout,
                           const Document& document, int head, int row) {
        auto left = Memory::template streamed<0>(ring_.stage), right = Memory::template streamed<1>(ring_.stage);
        Barrier full = Memory::full(ring_.stage), landed(Memory::kLandedAt);
        bool foreign = brings_foreign_rows(layout, document, row + left.kRows);
        Memory::empty(ring_.stage).wait(ring_.parity ^ 1);
        if (tiles::lane() == 0) {
            Barrier barrier = foreign ? landed : full;
            barrier.arrive_expecting(Memory::kStageBytes);
            copy_rows(left, first, barrier, document, head, row);
            copy_rows(right, second, barrier, document, head, row);
        }
        if (foreign) {
            landed.wait(landed_);
            landed_ ^= 1;
            clear_rows(left, document.length - row, tiles::lane(), tiles::kWarp);
            if (kCleared == 2) clear_rows(right, document.length - row, tiles::lane(), tiles::kWarp);
            tiles::fence_async();
            tiles::sync_warp();
            if (tiles::lane() == 0) full.arrive();
        }
        ring_.advance();
    }

private:
    typename Memory::OwnRing own_;
    typename Memory::StageRing ring_;
    int landed_ = 0;
};

// The rows of a warpgroup as the operand a of products over kDepth columns: in shared memory, or in registers, which
// halves what a product reads from there.
template <class Tile, int kDepth, bool kInRegisters>
class OwnRows {
public:
    using Element = typename Tile::Element;

    JMLR_DEVICE explicit OwnRows(const Tile& tile) : tile_(tile) {
        if constexpr (kInRegisters) {
            JMLR_UNROLL
            for (int k = 0; k < kDepth; k += 16) {
                auto a = tiles::Fragments<Element>::load_a(tile.panel(k / Tile::kPanelColumns),
                                                           tiles::warp() % tiles::kWarpgroupWarps * 16,
                                                           k % Tile::kPanelColumns);
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) r_[k / 16][i] = a.r[i];
            }
        }
    }

    // c = a b^T.
    template <class Other, int kColumns>
    JMLR_DEVICE void multiply(float (&c)[kColumns][4], const Other& b) const {
        if constexpr (kInRegisters) {
            static_assert(Other::kRows == 8 * kColumns && kDepth <= Other::kColumns);
            uint64_t matrix = tiles::inner_matrix(b, 0, 0);
            JMLR_UNROLL
            for (int k = 0; k < kDepth; k += 16)
                tiles::multiply_async<Element, Major::inner>(c, r_[k / 16], moved<Other>(matrix, k), k > 0);
        } else {
            multiply_rows<kDepth>(c, tile_, b);
        }
    }

private:
    Tile tile_;
    uint32_t r_[kInRegisters ? kDepth / 16 : 1][4];
};

// The gradients of padding.
template <class Tile, class Element>
JMLR_DEVICE void store_zeros(const Rows<Element>& rows, const Document& document, int head, int first, int head_dim) {
    each_owned_chunk<Tile>(rows, document, head, first, head_dim, [](Element* to, int, int) {
        tiles::store(reinterpret_cast<tiles::Chunk*>(to), tiles::Chunk{});
    });
}

}  // namespace jmlr::shifted_attention::sm90
