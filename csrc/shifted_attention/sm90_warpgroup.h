// What a warpgroup of consumers does with the 64 rows that it owns: products, operands made of accumulators, results
// on their way to global memory.
#pragma once

#include "../tiles/fragments.h"
#include "sm90_rows.h"

namespace jmlr::shifted_attention::sm90 {

using tiles::Barrier;
using tiles::Major;
using tiles::Panels;

// Rows of a warpgroup, which are those of its products.
constexpr int kOwned = 64;

// Of the accumulators of a warpgroup.
JMLR_DEVICE int own_row(int i) { return tiles::warp() % tiles::kWarpgroupWarps * 16 + tiles::accumulator_row(i); }

JMLR_DEVICE bool is_first_of_warpgroup() { return tiles::thread_index() % tiles::kWarpgroup == 0; }

// The descriptor of a tile's columns from k on: one addition to that of its first, since addresses have no carry.
template <class Tile>
JMLR_DEVICE uint64_t moved(uint64_t first, int k) {
    uint32_t bytes = k / Tile::kPanelColumns * Tile::kPanelBytes + k % Tile::kPanelColumns * 2;
    return (first & 0xffffffff00000000u) | uint32_t(uint32_t(first) + bytes / 16);
}

// a b^T, summed over the first kDepth columns of both tiles; b may have more rows than c has columns.
template <int kDepth, class Tile, class Other, int kColumns>
JMLR_DEVICE void multiply_rows(float (&c)[kColumns][4], const Tile& a, const Other& b) {
    static_assert(Tile::kRows == kOwned && Other::kRows >= 8 * kColumns && kDepth <= Tile::kColumns);
    uint64_t left = tiles::inner_matrix(a, 0, 0), right = tiles::inner_matrix(b, 0, 0);
    JMLR_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
        tiles::multiply_async<typename Tile::Element, Major::inner, Major::inner>(c, moved<Tile>(left, k),
                                                                                  moved<Other>(right, k), k > 0);
    }
}

// Accumulators as the operand a of the next product.
template <class Element, int kColumns>
struct Weights {
    uint32_t r[kColumns / 2][4];

    // The first of them, where there are fewer.
    template <int kTaken>
    JMLR_DEVICE void take(const float (&c)[kTaken][4]) {
        static_assert(kTaken <= kColumns);
        JMLR_UNROLL
        for (int k = 0; k < kTaken / 2; ++k) {
            auto a = tiles::Fragments<Element>::from_accumulators(&c[2 * k]);
            JMLR_UNROLL
            for (int i = 0; i < 4; ++i) r[k][i] = a.r[i];
        }
    }

    // sums += weights rows, with the rows of a tile; of the first kTaken columns of weights alone.
    template <int kTaken = kColumns, class Tile, int kSums>
    JMLR_DEVICE void multiply(float (&sums)[kSums][4], const Tile& rows) const {
        static_assert(Tile::kRows == 8 * kColumns && 8 * kSums <= Tile::kColumns);
        JMLR_UNROLL
        for (int k = 0; k < kTaken / 2; ++k) {
            tiles::multiply_async<Element, Major::outer>(sums, r[k], tiles::outer_matrix(rows, 16 * k, 0), true);
        }
    }
};

// Calls `body(pointer, row, column)` for every chunk of the owned rows among kOwned from `first` on.
template <class Tile, class Element, class Body>
JMLR_DEVICE void each_owned_chunk(const Rows<Element>& rows, const Document& document, int head, int first,
                                  int head_dim, Body body) {
    constexpr int kPerChunk = Tile::Panel::kPerChunk, kChunks = Tile::kColumns / kPerChunk;
    Element* base = rows.data + document.batch * rows.batch_stride +
                    int64_t(document.first + first) * rows.token_stride + head * rows.head_stride;
    int count = smaller(document.owned - first, kOwned);
    JMLR_UNROLL_BY(1)
    for (int i = tiles::thread_index() % tiles::kWarpgroup; i < count * kChunks; i += tiles::kWarpgroup) {
        int row = i / kChunks, column = i % kChunks * kPerChunk;
        if (column < head_dim) body(base + row * rows.token_stride + column, row, column);
    }
}

// The sums of a warpgroup, of which the document owns the rows from position `first` on, by way of `staged`, which
// nobody else needs any more. The warpgroup's first thread has wait_stores() to call. `id` is the warpgroup's barrier.
template <class Tile, class Element, int kSums>
JMLR_DEVICE void store_sums(const float (&sums)[kSums][4], const Tile& staged, const TensorMap& map,
                            const Rows<Element>& rows, const Document& document, int head, int first, int head_dim,
                            int id) {
    JMLR_UNROLL
    for (int n = 0; n < Tile::kColumns / 8; ++n) {
        JMLR_UNROLL
        for (int i = 0; i < 4; i += 2) {
            const float* pair = n < kSums ? &sums[n < kSums ? n : 0][i] : nullptr;
            staged.panel(n / 8).write_pair(own_row(i), n % 8 * 8 + tiles::accumulator_column(i), pair ? pair[0] : 0,
                                           pair ? pair[1] : 0);
        }
    }
    tiles::fence_async();
    tiles::sync_threads_of(id, tiles::kWarpgroup);
    if (first + kOwned <= document.owned) {
        if (is_first_of_warpgroup()) {
            store_rows(map, staged, document, head, first);
            tiles::commit_stores();
        }
        return;
    }
    each_owned_chunk<Tile>(rows, document, head, first, head_dim, [&](Element* to, int row, int column) {
        tiles::store(reinterpret_cast<tiles::Chunk*>(to), staged.at(row, column).template as<tiles::Chunk>().read());
    });
}

}  // namespace jmlr::shifted_attention::sm90
