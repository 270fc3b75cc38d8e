// The one thread that walks a block's documents: it orders the copies of each tile of tokens into a ring of stages, and
// leaves a note on the tile beside it, which is all that the others know.
#pragma once

#include "../tiles/hopper.h"
#include "sm90_prepare.cuh"
#include "sm90_tiles.h"

namespace jmlr::maxsim::sm90 {

// What the walk says of a stage to those who multiply.
struct alignas(64) Note {
    int document;      // of its query, or of all
    int set;           // of query rows
    int first;         // token of the tile
    uint32_t state;    // tokens to multiply with, and the flags below
    uint32_t kept[4];  // a bit per token of the tile
    int begin;         // the document's first kept token
};

constexpr uint32_t kColumnsMask = 0xffff, kEnds = 1u << 16, kWhole = 1u << 17, kTooLong = 1u << 18, kStop = 1u << 19;

// Of one block. Kernel: its stages, their barriers and notes, and its Params.
template <class Kernel>
struct Walk {
    using TextTile = typename Kernel::TextTile;
    using Element = typename TextTile::Element;
    using Ring = typename Kernel::Ring;
    static constexpr ForwardTiles kTiles = Kernel::kTiles;
    static constexpr int kTokens = kTiles.tokens, kRings = Kernel::kRings;

    const typename Kernel::Params& p;
    Ring ring{}, other{};  // of the warpgroup whose turn it is
    int turn = 0;

    JMLR_DEVICE int stage() const { return turn + kRings * ring.stage; }

    JMLR_DEVICE void take_turns() {
        if constexpr (kRings == 2) {
            Ring own = ring;
            ring = other;
            other = own;
            turn ^= 1;
        }
    }

    // `copy`: orders the copies of the stage, of so many bytes.
    template <class Copy>
    JMLR_DEVICE void leave(const Note& note, int bytes, Copy copy) {
        Kernel::empty(stage()).wait(ring.parity ^ 1);
        Kernel::note_of(stage()).write(0, note);
        Kernel::full(stage()).arrive_expecting(bytes);
        copy(stage());
        ring.advance();
    }

    JMLR_DEVICE void copy_tile(int stage, const Text<Element>& text, const Note& note, int query, int boxes) {
        JMLR_UNROLL
        for (int panel = 0; panel < TextTile::kPanels; ++panel) {
            for (int box = 0; box < boxes; ++box) {
                int to = Kernel::text_tile(stage).offset + panel * TextTile::kPanelBytes + box * kTiles.box * 128;
                int column = panel * TextTile::kPanelColumns, token = note.first + box * kTiles.box;
                if (p.problem.cu_seqlens != nullptr) {
                    tiles::copy_box(to, p.documents, Kernel::full(stage), column, int(text.place) + token);
                } else if (p.problem.candidates) {
                    tiles::copy_box(to, p.documents, Kernel::full(stage), column, token, note.document, query);
                } else {
                    tiles::copy_box(to, p.documents, Kernel::full(stage), column, token, note.document);
                }
            }
        }
    }

    JMLR_DEVICE void walk_document(int set, int query, int document) {
        const Problem& problem = p.problem;
        int64_t number = document_number(problem, query, document);
        Text<Element> text = text_of<Element>(problem, query, document);
        Extent extent{0, text.length};
        const uint32_t* bits = nullptr;
        if (p.bits != nullptr) {
            extent = tiles::load(p.extents + number);
            bits = p.bits + bits_place(problem, number, text.place);
        }
        bool too_long = problem.cu_seqlens != nullptr && problem.max_length > 0 && text.length > problem.max_length;
        Note note{document, set, extent.begin / kTokens * kTokens, 0, {}, extent.begin};
        do {
            int left = tiles::larger(extent.end - note.first, 0), columns = tiles::smaller(left, kTokens);
            uint32_t whole = ~0u;
            JMLR_UNROLL
            for (int i = 0; i < kTokens / 32; ++i) {
                int inside = columns - 32 * i;
                note.kept[i] = inside >= 32 ? ~0u : inside <= 0 ? 0u : (1u << inside) - 1;
                if (bits != nullptr && inside > 0) note.kept[i] &= tiles::load(bits + note.first / 32 + i);
                whole &= note.kept[i];
            }
            columns = tiles::ceil_div(columns, kTiles.step) * kTiles.step;
            note.state = uint32_t(columns) | (left <= kTokens ? kEnds : 0u) | (too_long ? kTooLong : 0u) |
                         (whole == ~0u ? kWhole : 0u);
            int boxes = tiles::ceil_div(columns, kTiles.box);
            leave(note, boxes * kTiles.box * 128 * TextTile::kPanels,
                  [&](int stage) { copy_tile(stage, text, note, query, boxes); });
            note.first += kTokens;
        } while ((note.state & kEnds) == 0);
        take_turns();
    }

    // Every block takes as many documents as another, or one more: a run of them that goes on with the next set of
    // rows, so that rows are loaded as seldom as can be.
    JMLR_DEVICE void run() {
        int64_t documents = p.problem.documents_per_query, pairs = p.sets * documents;
        int64_t from = pairs * tiles::block_index() / tiles::block_count();
        int64_t to = pairs * (tiles::block_index() + 1) / tiles::block_count();
        int set = int(from / documents), document = int(from - set * documents);
        for (int64_t pair = from; pair < to; ++pair) {
            int query = set / p.sets_per_list;  // without candidates there is one list
            walk_document(set, query, document);
            if (++document == documents) document = 0, ++set;
        }
        Note stop{0, -1, 0, kStop, {}, 0};
        JMLR_UNROLL
        for (int i = 0; i < kRings; ++i) {
            leave(stop, 0, [](int) {});
            take_turns();
        }
    }
};

}  // namespace jmlr::maxsim::sm90
