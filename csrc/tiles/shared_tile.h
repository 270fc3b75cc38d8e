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

    // The same place for row + down and column + right, where `row` and `column` differ between lanes, `down` and
    // `right` do not: most of the latter two becomes part of the instruction, not of an address of its own. `down` is a
    // multiple of 8, `right` of two chunks, and `column` lies in the first two.
    JMLR_DEVICE Shared<Element> at(int row, int down, int column, int right) const {
        int moved = int(unsigned(right) / kPerChunk % kPeriod), chunk = (column / kPerChunk) ^ swizzle(row) ^ moved;
        return base_ + (down * kColumns + right - moved * kPerChunk) +
               (row * kColumns + chunk * kPerChunk + column % kPerChunk);
    }

    JMLR_DEVICE Element read(int row, int column) const { return at(row, column).read(); }
    JMLR_DEVICE void write(int row, int column, Element value) const { at(row, column).write(0, value); }

    // Fills the tile from rows in global memory. `row_pointer(row)` gives the first element of a row, or nullptr for a
    // row of zeros; columns from `columns` on are zero. Called by all threads of the block. With `whole_chunks` (every
    // row starts at a multiple of 16 bytes) the copies are asynchronous: commit, wait and a barrier come after; without
    // it, a barrier.
    template <int kThreads, class RowPointer>
    JMLR_DEVICE void fill(RowPointer row_pointer, int columns, bool whole_chunks) const {
        bool chunks = whole_chunks && columns % kPerChunk == 0;
        JMLR_UNROLL_BY(1)
        for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
            int row = i / kChunks, column = i % kChunks * kPerChunk;
            const Element* from = row_pointer(row);
            Shared<Element> to = at(row, column);
            bool inside = from != nullptr && column < columns;
            if (chunks) {
                copy_async(to, inside ? from + column : from, inside);
            } else if constexpr (sizeof(Element) == 1) {
                to.template as<Chunk>().write(0,
                                              bytes_of(inside ? from + column : from, inside ? columns - column : 0));
            } else {
                for (int j = 0; j < kPerChunk; ++j)
                    to.write(j, inside && column + j < columns ? load(from + column + j) : Element{});
            }
        }
    }

    struct alignas(8) Pair {
        float first, second;
    };

    // Two neighbours in one access; `column` is even.
    JMLR_DEVICE void write_pair(int row, int column, float first, float second) const {
        if constexpr (sizeof(Element) == 2) {
            at(row, column).template as<uint32_t>().write(0, pack<Element>(first, second));
        } else {
            at(row, column).template as<Pair>().write(0, Pair{first, second});
        }
    }

    // The way back of fill: rows for which `row_pointer` gives nullptr, and columns from `columns` on, are not stored.
    // A barrier comes before.
    template <int kThreads, class RowPointer>
    JMLR_DEVICE void store(RowPointer row_pointer, int columns, bool whole_chunks) const {
        for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
            int row = i / kChunks, column = i % kChunks * kPerChunk;
            Element* to = row_pointer(row);
            if (to == nullptr || column >= columns) continue;
            if (whole_chunks && column + kPerChunk <= columns) {
                tiles::store(reinterpret_cast<Chunk*>(to + column), at(row, column).template as<Chunk>().read());
            } else {
                for (int j = 0; j < kPerChunk && column + j < columns; ++j)
                    tiles::store(to + column + j, read(row, column + j));
            }
        }
    }

private:
    // Chunks of a row are permuted among this many neighbours.
    static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;

    // A chunk of single bytes, zeros after the first `count`.
    static JMLR_DEVICE Chunk bytes_of(const Element* from, int count) {
        Chunk chunk{};
        JMLR_UNROLL
        for (int j = 0; j < 16; ++j) {
            if (j < count) chunk.word[j / 4] |= uint32_t(load(from + j)) << j % 4 * 8;
        }
        return chunk;
    }

    static JMLR_DEVICE int swizzle(int row) { return int(unsigned(row) / (8 / kPeriod) % kPeriod); }

    Shared<Element> base_;
};

}  // namespace tiles
