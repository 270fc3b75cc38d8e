// A matrix in shared memory, its 16-byte chunks permuted within each row ("swizzled") so that the eight rows of an 8 x
// 8 matrix lie in different banks, whatever the width.
#pragma once

#include "primitives.h"

namespace tiles {

template <class Element_, int kRows_, int kColumns_>
class SharedTile {
public:
    using Element = Element_;
    static constexpr int kRows = kRows_;
    static constexpr int kColumns = kColumns_;
    static constexpr int kPerChunk = 16 / int(sizeof(Element));
    static constexpr int kChunks = kColumns / kPerChunk;  // of a row
    static constexpr int kBytes = kRows * kColumns * int(sizeof(Element));
    static_assert(kColumns % kPerChunk == 0);

    // At a byte offset of the block's shared memory, a multiple of 16.
    JMLR_DEVICE explicit SharedTile(int offset) : base_(shared_memory<Element>(offset)) {}

    JMLR_DEVICE Shared<Element> at(int row, int column) const {
        int chunk = (column / kPerChunk) ^ swizzle(row);
        return base_ + (row * kColumns + chunk * kPerChunk + column % kPerChunk);
    }

    JMLR_DEVICE Element read(int row, int column) const { return at(row, column).read(); }
    JMLR_DEVICE void write(int row, int column, Element value) const { at(row, column).write(0, value); }

    // Fills the tile from rows in global memory. `row_pointer(row)` gives the first element of a row, or nullptr for a
    // row of zeros; columns from `columns` on are zero. Called by all threads of the block. With `whole_chunks` (every
    // row starts at a multiple of 16 bytes) the copies are asynchronous: commit, wait and a barrier come after; without
    // it, a barrier.
    template <int kThreads, class RowPointer>
    JMLR_DEVICE void fill(RowPointer row_pointer, int columns, bool whole_chunks) const {
        for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
            int row = i / kChunks, column = i % kChunks * kPerChunk;
            const Element* from = row_pointer(row);
            Shared<Element> to = at(row, column);
            if (whole_chunks && (from == nullptr || column + kPerChunk <= columns || column >= columns)) {
                copy_async(to, from == nullptr || column >= columns ? from : from + column,
                           from != nullptr && column < columns);
            } else {
                JMLR_UNROLL
                for (int j = 0; j < kPerChunk; ++j) {
                    bool inside = from != nullptr && column + j < columns;
                    to.write(j, inside ? load(from + column + j) : Element{});
                }
            }
        }
    }

private:
    static JMLR_DEVICE int swizzle(int row) {
        if constexpr (kChunks % 8 == 0) return row & 7;
        if constexpr (kChunks % 4 == 0) return (row >> 1) & 3;
        if constexpr (kChunks % 2 == 0) return (row >> 2) & 1;
        return 0;
    }

    Shared<Element> base_;
};

}  // namespace tiles
