// Rows of one head between global memory and panels, by copies of boxes; and how a persistent block learns of its work.
#pragma once

#include "../tiles/launch.h"
#include "../tiles/tensor_map.h"
#include "arguments.h"

namespace jmlr::shifted_attention::sm90 {

using tiles::TensorMap;

// A tensor [batch, token, head, column]; a box is `rows` tokens of one head, 128 bytes of columns.
inline tiles::Axes axes_of(const Input& input, const Problem& problem, int64_t heads, int rows) {
    return {4,
            {problem.head_dim, heads, problem.rows, problem.batches},
            {1, input.head_stride, input.token_stride, input.batch_stride},
            {64, 1, rows, 1}};
}

// The strides of a contiguous tensor.
inline Input contiguous_input(const void* data, const Problem& problem, int64_t heads) {
    return {data, problem.rows * heads * problem.head_dim, heads * problem.head_dim, problem.head_dim};
}

inline bool mappable(const Input& input, const Problem& problem, int64_t heads) {
    return tiles::can_map(input.data, axes_of(input, problem, heads, 1), 2);
}

template <class Element>
TensorMap map_of(const Input& input, const Problem& problem, int64_t heads, int rows) {
    return tiles::tensor_map(static_cast<const Element*>(input.data), axes_of(input, problem, heads, rows));
}

// Blocks of a launch over `items`, which a block takes in steps of as many.
inline int64_t persistent_blocks(int64_t items, int processors) {
    if (items > 0x7fffffff) throw std::runtime_error("the problem needs more than 2**31 - 1 blocks: split the batch");
    return smaller(items, int64_t(processors));
}

// By one thread: the rows of a head from a document's position on, which may lie before or after the document. Beyond
// the tensor they are zeros, beyond the document whatever memory holds. In a cluster of kBlocks every block calls it,
// with its rank, and brings its part of the rows to all of them; boxes are that much smaller.
template <int kBlocks = 1, class Tile>
JMLR_DEVICE void copy_rows(const Tile& to, const TensorMap& from, const tiles::Barrier& barrier,
                           const Document& document, int head, int position, int rank = 0) {
    constexpr int kPart = Tile::kRows / kBlocks;
    int row = document.first + position + rank * kPart;
    JMLR_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        int offset = to.offset + panel * Tile::kPanelBytes + rank * kPart * 128, column = panel * Tile::kPanelColumns;
        if constexpr (kBlocks == 1) {
            tiles::copy_box(offset, from, barrier, column, head, row, document.batch);
        } else {
            tiles::copy_box_to_all((1 << kBlocks) - 1, offset, from, barrier, column, head, row, document.batch);
        }
    }
}

// The way back. Nothing is written beyond the tensor.
template <class Tile>
JMLR_DEVICE void store_rows(const TensorMap& to, const Tile& from, const Document& document, int head, int position) {
    JMLR_UNROLL
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
        tiles::store_box(to, from.offset + panel * Tile::kPanelBytes, panel * Tile::kPanelColumns, head,
                         document.first + position, document.batch);
    }
}

// Whether tile rows up to `end` (a position) hold anything that the document does not own and memory may hold anything
// in: not so at the end of the tensor, where copies bring zeros.
JMLR_DEVICE bool brings_foreign_rows(const Layout& layout, const Document& document, int end) {
    return end > document.length && document.first + document.length < layout.rows;
}

// Rows from `row` on become zeros, by the threads `thread`, `thread + threads` ... Then fence_async() and a barrier.
template <class Tile>
JMLR_DEVICE void clear_rows(const Tile& tile, int row, int thread, int threads) {
    JMLR_UNROLL_BY(1)
    for (int i = thread; i < (Tile::kRows - row) * Tile::kPanels * 8; i += threads) {
        int chunk = i % 8, panel = i / 8 % Tile::kPanels;
        tile.panel(panel)
            .at(row + i / (8 * Tile::kPanels), chunk * Tile::Panel::kPerChunk)
            .template as<tiles::Chunk>()
            .write(0, tiles::Chunk{});
    }
}

// What the producer tells the consumers of a block: the item that they are to work on next. It goes through shared
// memory, because finding a packed document takes a search that the producer has the time for.
constexpr int kWorkBytes = 32;

JMLR_DEVICE void write_work(int offset, const Work& work) {
    const Document& d = work.document;
    auto to = tiles::shared_memory<tiles::Chunk>(offset);
    to.write(0, {{uint32_t(work.head), uint32_t(work.tile), uint32_t(d.batch), uint32_t(d.first)}});
    to.write(1, {{uint32_t(d.owned), uint32_t(d.length), 0, 0}});
}

JMLR_DEVICE Work read_work(int offset) {
    auto from = tiles::shared_memory<tiles::Chunk>(offset);
    tiles::Chunk a = from.read(0), b = from.read(1);
    return {int(a.word[0]), {int(a.word[2]), int(a.word[3]), int(b.word[0]), int(b.word[1])}, int(a.word[1])};
}

// Told when there are no more items.
JMLR_DEVICE Work no_work() { return {-1, {0, 0, 0, 0}, 0}; }

}  // namespace jmlr::shifted_attention::sm90
