// Tile sizes of the smooth backward; its forward has the hard maximum's (tile_sizes.h). Two blocks of any of them fit
// a multiprocessor's shared memory, and one fits 99 KB. No choice has been timed.
#pragma once

#include "tile_sizes.h"

namespace jmlr::maxsim {

// The embedding dimensions that the kernels are compiled for; above, a block owns one chunk of its rows' gradients and
// multiplies the similarities anew.
constexpr int smooth_gradient_dimension(int64_t dimension) {
    return dimension <= 64 ? 64 : dimension <= 128 ? 128 : kWalked;
}

// Columns of a tile, and of the gradient that a block owns.
constexpr int smooth_gradient_chunk(int element_size, int dimension) {
    return dimension != kWalked ? dimension : element_size == 2 ? 128 : 64;
}

// d(queries): rows that a block owns, and document tokens that stream past them.
constexpr ForwardTiles smooth_query_gradient_tiles(int element_size, int dimension) {
    bool half = element_size == 2;
    int chunk = smooth_gradient_chunk(element_size, dimension), resident = dimension == kWalked ? 0 : 1;
    return {4, 1, 1, half ? 64 : 16, chunk, resident, false, 2, 2, half ? 4 : 1};
}

// d(documents): tokens that a block owns, and query rows that stream past them.
struct SmoothDocumentTiles {
    int tokens, rows, chunk, depths_unrolled, min_blocks;

    constexpr int threads() const { return tokens / 16 * 32; }
};

constexpr SmoothDocumentTiles smooth_document_gradient_tiles(int element_size, int dimension) {
    bool half = element_size == 2;
    return {64, half ? 32 : 16, smooth_gradient_chunk(element_size, dimension), half ? 4 : 1, 2};
}

}  // namespace jmlr::maxsim
