// What compute capability 9.0 adds to primitives.h: copies that a descriptor of the tensor steers, barriers that count
// arrivals and bytes, products that read shared memory by themselves, registers that warpgroups hand to each other.
// Files that include this are compiled for sm_90a alone. docs/hopper.md explains how kernels are put together of it.
//
// Shared memory is named by byte offsets, as everywhere. A *warpgroup* is 128 neighbouring threads (4 warps) from a
// multiple of 128 on.
//
//   TensorMap                            describes a tensor in global memory; made on the host (tensor_map.h), passed
//   as a
//                                        member of a kernel's Params
//   prefetch_map(map)                    hint: its copies come soon; by one thread
//
//   Barrier(offset)                      8 bytes of shared memory, aligned to 8. It has phases, which complete when all
//                                        expected arrivals have come and all expected bytes; their parity alternates,
//                                        that of the first is 0.
//     .init(arrivals)                    by one thread; then fence_barriers() by that thread and sync_block() (or
//                                        sync_cluster()) by all, before anybody uses it
//     .arrive()                          releases what the calling thread did before
//     .arrive_expecting(bytes)           the same, and the phase waits for so many bytes of copies too
//     .wait(parity)                      until the phase of this parity has completed; acquires. A barrier that was
//     never
//                                        used lets wait(1) pass: a producer starts with parity 1, a consumer with 0.
//     .arrive_at(block)                  arrive at the same offset in another block of the cluster
//   fence_barriers()
//
//   copy_box(offset, map, barrier, c0, c1, ...)   by ONE thread: the box whose first element has coordinates c0 (the
//                                        innermost), c1, ..., to shared memory at a multiple of 1024 bytes. Elements
//                                        outside of the tensor, which coordinates below zero name too, become zeros.
//                                        The whole box's bytes count at the barrier, also those.
//   copy_box_to_all(blocks, offset, ...) the same, to that offset in every block of the cluster whose bit is set, and
//   at
//                                        that barrier in each of them
//   store_box(map, offset, c0, c1, ...)  by one thread, the other way; elements outside are not written. After
//                                        fence_async() by whoever wrote the shared memory, and a barrier.
//   commit_stores()  wait_stores<n>()    of the same thread: until at most n groups still read shared memory
//   wait_stores_written<n>()             until at most n groups are not yet in global memory
//   copy_bytes(offset, global, bytes, barrier)    by one thread: plain bytes; all three multiples of 16
//
//   fence_async()                        what this thread wrote to shared memory itself will be seen by products and
//                                        stores of boxes; before the barrier that tells the others
//
//   Products: c[64, N] = a[64, 16] b[16, N] (+ c), by a whole warpgroup, all of whose warps call converged.
//     Warp w of the warpgroup holds rows 16 w .. 16 w + 15, laid out like the accumulators of fragments.h: float
//     c[N / 8][4]. a comes from shared memory or from registers (Fragments<Element>::A's layout), b from shared memory.
//     Of single-byte elements the inner dimension is 32.
//   open_products(c, ...)                before the first product, and again whenever the threads themselves have
//   written
//                                        accumulators or a's registers since; names those accumulators
//   multiply_async<Element, A, B>(c, a, b, accumulate)     a, b: descriptors, see below; A, B: the Major of each
//   multiply_async<Element, B>(c, a_registers, b, accumulate)
//   close_products()                     ends a group of products
//   wait_products<n>(c, ...)             until at most n groups are under way. The accumulators that are ready by then
//   must
//                                        be named: between a product and that wait nobody touches them, nor a's
//                                        registers, nor writes the shared memory that a and b lie in.
//
//   inner_matrix(tile, row, k)  outer_matrix(tile, k, column)      descriptors of pieces of Panels, see below
//
//   take_registers<n>()  give_registers<n>()      by all warps of a warpgroup: from now on a thread has n registers, a
//                                        multiple of 8 up to 240. What is taken must have been given by others: taking
//                                        waits.
//   sync_threads_of(id, threads)  arrive_for(id, threads)   barrier id (1 .. 15; 0 is sync_block's) for so many
//   threads,
//                                        some of which may only arrive
//   cluster_rank()  cluster_size()  sync_cluster()         a kernel has clusters with `static constexpr int kCluster`
#pragma once

#include "primitives.h"
#include "shared_tile.h"

namespace tiles {

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;

// Numbers of one byte that the tensor cores take: float8_e4m3fn.
struct Float8 {
    uint8_t bits;
};

// Which of its two dimensions a matrix has contiguous in memory: the inner one of the product (`inner`, "K-major"), or
// the rows of a or columns of b (`outer`, "MN-major").
enum class Major { inner, outer };

// A tile in shared memory that copies of boxes fill and products read: panels of 128 bytes of columns, one after the
// other, each with all rows. Within a panel chunks are swizzled as by SharedTile of that width, which is the layout
// that CU_TENSOR_MAP_SWIZZLE_128B and the products' descriptors mean.
template <class Element_, int kRows_, int kColumns_>
struct Panels {
    using Element = Element_;
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kPanelColumns = 128 / int(sizeof(Element));
    static constexpr int kPanels = kColumns / kPanelColumns;
    static constexpr int kPanelBytes = kRows * 128;
    static constexpr int kBytes = kPanels * kPanelBytes;
    static_assert(kColumns % kPanelColumns == 0 && kRows % 8 == 0);
    using Panel = SharedTile<Element, kRows, kPanelColumns>;

    int offset;  // a multiple of 1024

    JMLR_DEVICE Panel panel(int number) const { return Panel(offset + number * kPanelBytes); }
    JMLR_DEVICE Shared<Element> at(int row, int column) const {
        return panel(column / kPanelColumns).at(row, column % kPanelColumns);
    }
};

// A matrix descriptor (PTX manual, "Matrix descriptor" of wgmma): start, leading and stride offsets in 16 bytes, and
// the swizzle of 128 bytes. `panel_bytes` separates panels of 64 columns; only Major::outer looks across panels.
JMLR_BOTH uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes) {
    uint64_t start = (address & 0x3ffffu) >> 4, leading = panel_bytes >> 4, stride = 1024 >> 4;
    return start | leading << 16 | stride << 32 | uint64_t(1) << 62;
}

}  // namespace tiles

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
#include "hopper_cuda.h"
#else
#include "hopper_host.h"
#endif

namespace tiles {

// Descriptors of the pieces that one product takes out of Panels. Rows and columns are the tile's; the first row is a
// multiple of 8.
//
// Major::inner (the tile holds [row or n, k]): rows from `row` on, k .. k + 31 bytes' worth.
template <class Tile>
JMLR_DEVICE uint64_t inner_matrix(const Tile& tile, int row, int k) {
    int panel = k / Tile::kPanelColumns, within = k % Tile::kPanelColumns * int(sizeof(typename Tile::Element));
    return matrix_descriptor(shared_address(tile.offset + panel * Tile::kPanelBytes + row * 128 + within),
                             Tile::kPanelBytes);
}

// Major::outer (the tile holds [k, n]): columns from `column` on, a multiple of a panel's; rows k .. k + 15.
template <class Tile>
JMLR_DEVICE uint64_t outer_matrix(const Tile& tile, int k, int column) {
    static_assert(sizeof(typename Tile::Element) == 2);
    return matrix_descriptor(shared_address(tile.offset + column / Tile::kPanelColumns * Tile::kPanelBytes + k * 128),
                             Tile::kPanelBytes);
}

// A ring of stages that producers fill and consumers empty: which stage, and the parity of its phase.
template <int kStages>
struct Ring {
    int stage = 0, parity = 0;
    JMLR_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

}  // namespace tiles
