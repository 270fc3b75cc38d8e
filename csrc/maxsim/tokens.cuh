// How the forward pass gets tiles of document tokens: what depends on the way in which documents are stored.
//
// A source of tokens is a struct; all threads of the block call its functions. compressed_tokens.cuh has others.
//   Stored             the type in which a document's rows lie in memory
//   Params             what else must be known
//   tiles_of(...)      its tile sizes, as forward_tiles
//   kWinners           whether winners and maxima may be asked for
//   kStageBytes<Tile>  shared memory of a stage, which the tokens of one step take on their way
//   fetch(...)         begins to fill a stage with the tokens of a tile, columns from `column` on
//   scales(...)        a factor of the similarity per token, by the token's place, or null
//   kDecoded           false: a stage is the tile. true: it must be decoded into the tile, which takes
//   decode(...)        that, barriers before and after it,
//   kOwnBytes<Tile>    shared memory for all steps,
//   prepare(...)       what fills that once, a barrier after it
#pragma once

#include "../tiles/shared_tile.h"
#include "rows.cuh"
#include "tile_sizes.h"

namespace jmlr::maxsim {

// Rows of a document as they are, columns from `column` on. `position(i)` is where token i of the tile stands.
template <int kThreads, class Tile, class Position>
JMLR_DEVICE void fetch_rows(const Tile& to, const Problem& p, const Text<typename Tile::Element>& text,
                            Position position, int column, bool whole) {
    to.template fill<kThreads>([&](int i) { return text.first + position(i) * p.document_token_stride + column; },
                               int(p.dimension) - column, whole);
}

// Tokens that are stored as the tensor cores take them.
template <class Element>
struct PlainTokens {
    using Stored = Element;
    struct Params {};

    static constexpr ForwardTiles tiles_of(int element_size, int dimension, bool few_rows) {
        return forward_tiles(element_size, dimension, few_rows);
    }
    static constexpr bool kWinners = true, kDecoded = false;
    template <class Tile>
    static constexpr int kStageBytes = Tile::kBytes;
    template <class Tile>
    static constexpr int kOwnBytes = 0;

    template <class Tile, int kThreads, class Position>
    static JMLR_DEVICE void fetch(int stage, const Problem& p, const Params&, const Text<Element>& text,
                                  Position position, int column, bool whole) {
        fetch_rows<kThreads>(Tile(stage), p, text, position, column, whole);
    }

    static JMLR_DEVICE const float* scales(const Params&, const ForwardOutput& out) { return out.document_scales; }
};

}  // namespace jmlr::maxsim
