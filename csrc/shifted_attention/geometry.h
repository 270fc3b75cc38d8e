// Which document a block works on, and who may attend to whom.
//
// Every head walks a document in positions 0 .. length - 1, and its groups are runs of positions: position p is in
// group (p + shift) / size. A position is a token, but for the shifted heads of "wrap", whose positions start at token
// `roll` and come around. So there is one rule for both boundaries and both halves: query position i attends to key
// position j exactly when start(i) <= j <= i, or the same seen from the key, j <= i < end(j).
#pragma once

#include "../tiles/primitives.h"

namespace jmlr::shifted_attention {

using tiles::ceil_div;
using tiles::larger;
using tiles::smaller;

// Rows beyond this would need wider numbers than 32 bits for positions.
constexpr int64_t kMostRows = int64_t(1) << 29;

struct Layout {
    const int32_t* cu_seqlens;
    const int32_t* seq_lens;
    int documents, batches, rows;
    int heads, ratio;    // query heads, and how many of them share a kv head
    int group_size;      // at most 2 rows: longer groups are the same function
    int64_t half_group;  // by which "wrap" rolls
    bool wrap;
};

// One document. Its blocks write the results of `owned` rows; those from `length` on are padding, and become zeros.
struct Document {
    int batch, first;
    int owned, length;
};

struct Groups {
    int size, shift, roll, length;

    JMLR_DEVICE int start(int position) const { return larger(position - (position + shift) % size, 0); }
    JMLR_DEVICE int end(int position) const { return smaller(position - (position + shift) % size + size, length); }

    // Past the length, where padding is, every position is its own token.
    JMLR_DEVICE int token(int position) const {
        if (position >= length) return position;
        return position < length - roll ? position + roll : position + roll - length;
    }
    JMLR_DEVICE int position(int token) const { return token >= roll ? token - roll : token - roll + length; }
};

JMLR_DEVICE Groups groups_of(const Layout& layout, int head, int length) {
    bool shifted = head >= layout.heads / 2;
    int shift = shifted && !layout.wrap ? layout.group_size - layout.group_size / 2 : 0;
    int roll = shifted && layout.wrap && length > 0 ? int(layout.half_group % length) : 0;
    return {layout.group_size, shift, roll, length};
}

// A tile of one head; there is nothing to do where tile >= document.owned.
struct Work {
    int head;
    Document document;
    int tile;  // first position or token
};

// How many tiles a batch row has, and how they are dealt out: by groups, the same tile of every group before the next.
struct Deal {
    int tiles, of_group, groups;
};

JMLR_BOTH Deal deal_of(const Layout& layout, int block) {
    int tiles = ceil_div(layout.rows, block);
    int of_group = smaller(larger(layout.group_size / block, 1), tiles);
    return {tiles, of_group, ceil_div(tiles, of_group) + 1};
}

// Blocks of a launch over tiles of `block` rows of `heads` heads.
inline int64_t blocks_of(const Layout& layout, int64_t heads, int block) {
    if (layout.cu_seqlens != nullptr) return (int64_t(layout.rows / block) + layout.documents + 1) * heads;
    Deal deal = deal_of(layout, block);
    return int64_t(deal.of_group) * deal.groups * layout.batches * heads;
}

// Packed documents have no table of tiles: document n gets the tiles from cu_seqlens[n] / block + n on, which is enough
// for each, so a bisection finds n. The rows after the last document are one more document, of length 0.
template <int kBlock>
JMLR_DEVICE Work packed_work(const Layout& layout, int head, int turn) {
    int low = 0, high = layout.documents;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (tiles::load(layout.cu_seqlens + middle) / kBlock + middle <= turn) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    int first = tiles::load(layout.cu_seqlens + low);
    int owned = (low < layout.documents ? tiles::load(layout.cu_seqlens + low + 1) : layout.rows) - first;
    return {head, {0, first, owned, low < layout.documents ? owned : 0}, (turn - first / kBlock - low) * kBlock};
}

// The tiles whose walks are the longest come first, as far as tiles and groups divide: a group's last queries
// (kLastFirst), or its first keys. Heads vary fastest, so that blocks that run together share kv heads.
template <int kBlock, bool kLastFirst>
JMLR_DEVICE Work work_of(const Layout& layout, int block, int heads) {
    int head = block % heads, turn = block / heads;
    if (layout.cu_seqlens != nullptr) return packed_work<kBlock>(layout, head, turn);
    Deal deal = deal_of(layout, kBlock);
    int slots = deal.groups * layout.batches;
    int batch = turn % slots / deal.groups, group = turn % slots % deal.groups, rank = turn / slots;
    bool shifted = head * (layout.heads / heads) >= layout.heads / 2 && !layout.wrap;
    int before = shifted ? smaller((layout.group_size - layout.group_size / 2) / kBlock, deal.of_group) : 0;
    int number = group * deal.of_group + (kLastFirst ? deal.of_group - 1 - rank : rank) - before;
    int length = layout.rows;
    if (layout.seq_lens != nullptr) length = smaller(tiles::load(layout.seq_lens + batch), layout.rows);
    return {head, {batch, 0, layout.rows, length}, number < 0 || number >= deal.tiles ? layout.rows : number * kBlock};
}

}  // namespace jmlr::shifted_attention
