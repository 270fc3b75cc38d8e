// Rows of one head between global memory and tiles.
#pragma once

#include "../tiles/fragments.h"
#include "geometry.h"

namespace jmlr::shifted_attention {

// A tensor [batch, token, head, column] with unit stride in its columns.
template <class Element>
struct Rows {
    Element* data;
    int64_t batch_stride, token_stride, head_stride;
    bool whole_chunks;  // every row starts at a multiple of 16 bytes
};

// Tile rows tile .. come from the positions of a document; those from `end` on are zeros, whatever memory holds there.
template <int kThreads, class Tile, class Element>
JMLR_DEVICE void load_rows(const Tile& to, const Rows<const Element>& from, const Document& document, int head,
                           const Groups& groups, int tile, int end, int head_dim) {
    const Element* base =
        from.data + document.batch * from.batch_stride + document.first * from.token_stride + head * from.head_stride;
    to.template fill<kThreads>(
        [&](int row) -> const Element* {
            int position = tile + row;
            return position < end ? base + groups.token(position) * from.token_stride : nullptr;
        },
        head_dim, from.whole_chunks);
}

// The same way back, for all rows that the document owns.
template <int kThreads, class Tile, class Element>
JMLR_DEVICE void store_rows(const Tile& from, const Rows<Element>& to, const Document& document, int head,
                            const Groups& groups, int tile, int head_dim) {
    Element* base =
        to.data + document.batch * to.batch_stride + document.first * to.token_stride + head * to.head_stride;
    from.template store<kThreads>(
        [&](int row) -> Element* {
            int position = tile + row;
            return position < document.owned ? base + groups.token(position) * to.token_stride : nullptr;
        },
        head_dim, to.whole_chunks);
}

}  // namespace jmlr::shifted_attention
