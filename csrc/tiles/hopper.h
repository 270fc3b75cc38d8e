// What compute capability 9.0 adds to primitives.h: copies that a description of the tensor steers, barriers that
// count arrivals and bytes, products that read shared memory by themselves, registers that warpgroups hand to each
// other. Files that include this are compiled for sm_90a alone. docs/hopper.md shows how kernels are put together of
// it.
//
// Shared memory is named by byte offsets. A *warpgroup* is 128 neighbouring threads from a multiple of 128 on.
//
// TensorMap: describes a tensor in global memory; made on the host (tensor_map.h), a member of a kernel's Params.
//   prefetch_map(map): hint, by one thread: copies by it come soon
//
// Barrier(offset): 8 bytes of shared memory, aligned to 8. A phase completes when all expected arrivals and all
//   expected bytes have come; phases have parities 0, 1, 0, ...
//   init(arrivals): by one thread, who then calls fence_barriers(); before use, sync_block() or sync_cluster()
//   arrive(): releases what the calling thread did before
//   arrive_expecting(bytes): the same, and the phase waits for that many bytes of copies too
//   arrive_at(block): arrives at the same offset in another block of the cluster, to which what threads wrote
//   themselves is not released
//   wait(parity): until the phase of this parity has completed; acquires. Before the first phase wait(1) passes: a
//       producer starts with parity 1, a consumer with 0.
//
// Copies, each issued by ONE thread:
//   copy_box(offset, map, barrier, c0, c1, ...): the box from coordinates c0 (innermost), c1, ... to a multiple of
//       1024 bytes. Elements outside of the tensor, also at negative coordinates, become zeros; all bytes of the box
//       count at the barrier.
//   copy_box_to_all(blocks, offset, ...): the same to every block of the cluster whose bit is set, each with its own
//       barrier at that offset
//   copy_bytes(offset, global, bytes, barrier): plain bytes; all three multiples of 16
//   store_box(map, offset, c0, c1, ...): the way back; elements outside are not written. Before it, fence_async() by
//       those who wrote the shared memory, and a barrier.
//   commit_stores()  wait_stores<n>()  wait_stores_written<n>(): of the same thread: until at most n groups still
//       read shared memory, or are not yet in global memory
//   fence_async(): shared memory that this thread has written is seen by products and stores of boxes; before the
//       barrier that tells the others
//
// Products: c[64, N] = a[64, 16] b[16, N] (+ c), by all warps of a warpgroup, converged. Warp w of it holds rows 16 w
// .. 16 w + 15 in c[N / 8][4], laid out as the accumulators of fragments.h. b lies in shared memory, a there or in
// registers (the layout of Fragments<Element>::A). Of elements of one byte the inner dimension is 32.
//   open_products(c, ...): before the first product, and when threads have touched accumulators c or a's registers
//       since
//   multiply_async<Element, A, B>(c, a, b, accumulate): a, b: descriptors, A, B: the Major of each
//   multiply_async<Element, B>(c, a_registers, b, accumulate)
//   close_products(): ends a group of products
//   wait_products<n>(c, ...): until at most n groups are under way. It names the accumulators that are ready then:
//       between a product and that wait nobody touches them, nor a's registers, nor writes the shared memory that a
//       and b lie in.
//   inner_matrix(tile, row, k)  outer_matrix(tile, k, column): descriptors of pieces of Panels, below
//
// take_registers<n>(), give_registers<n>(): by all warps of a warpgroup: a thread has n registers from now on, a
//   multiple of 8 up to 240. Taking waits until others have given.
// sync_threads_of(id, threads), arrive_for(id, threads): barrier id (1 .. 15; 0 is sync_block's) for so many threads,
//   some of which may only arrive
// cluster_rank(), cluster_size(), sync_cluster(): of kernels with `static constexpr int kCluster`
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
