// Every tile size of the kernels for compute capability 8.0, in pure functions of the kernel, the element and the
// embedding.
#pragma once

#include <cstdint>

namespace jmlr::maxsim {

// The embedding dimensions that kernels are compiled for; kWalked takes any, in chunks.
constexpr int kWalked = 0;

constexpr int forward_dimension(int64_t dimension) {
    return dimension <= 64 ? 64 : dimension <= 128 ? 128 : dimension <= 256 ? 256 : kWalked;
}

// Query rows against which one block streams documents. A warp multiplies `row_tiles` times 16 rows with the document
// tile, or with its part where several warps share the rows (`token_warps`).
struct ForwardTiles {
    int row_warps, token_warps;
    int row_tiles;
    int tokens;      // of a document tile
    int chunk;       // columns of the embedding in a tile
    int resident;    // chunks of the query rows that stay in shared memory; 0: they are streamed like the documents
    bool registers;  // query rows are kept in registers
    int stages;
    int min_blocks;       // of a multiprocessor
    int depths_unrolled;  // steps of the tensor cores along the embedding that the compiler may mix

    constexpr int rows() const { return row_warps * row_tiles * 16; }
    constexpr int threads() const { return row_warps * token_warps * 32; }
    constexpr int tokens_per_warp() const { return tokens / token_warps; }
};

// `few_rows`: at most 32 query rows share a document. Then memory is the limit, and four warps share a tile of 32 rows.
// Otherwise a warp takes 32 rows where registers hold them, so that a document tile is read from shared memory once for
// two products; 16 rows of longer embeddings, and of float, whose three products for one are limit enough.
//
// There is one choice for all devices, and it fits the 99 KB of the smallest (tiles::SharedMemory). 128 rows of 256
// 16-bit columns in two chunks with two stages would need 1 KB more; four chunks with three stages need 92 KB, have as
// many bytes on their way, read shared memory as often, and leave room for as many blocks: one on compute capability
// 8.0, two on 9.0. They take a barrier more per tile, and up to 192 columns a quarter less work.
constexpr ForwardTiles forward_tiles(int element_size, int dimension, bool few_rows) {
    bool half = element_size == 2, walked = dimension == kWalked;
    int chunk = !half || walked || dimension == 64 ? 64 : 128;
    int resident = walked ? 0 : dimension / chunk;
    bool registers = half && resident == 1;
    int unrolled = registers ? chunk / 16 : half ? 4 : 1;
    if (few_rows) return {1, 4, 2, 64, chunk, resident, registers, registers ? 3 : 2, 2, unrolled};
    if (registers) return {4, 1, 2, 64, chunk, resident, true, 2, 2, unrolled};
    if (half && !walked) return {8, 1, 1, 64, 64, dimension / 64, false, 3, 2, unrolled};
    if (half) return {8, 1, 1, 64, chunk, resident, false, 2, 2, unrolled};
    return {4, 1, 1, 64, chunk, resident, false, 2, 2, unrolled};
}

// The same for compressed documents, which have a decoded tile beside the stages. All of it fits the 99 KB of a block
// on consumer GPUs. Few rows leave little to multiply: registers go to the blocks that hide the latency instead.
constexpr ForwardTiles compressed_tiles(int element_size, int dimension, bool few_rows) {
    bool half = element_size == 2, walked = dimension == kWalked;
    int chunk = !half || walked || dimension == 64 ? 64 : 128;
    int resident = walked ? 0 : dimension / chunk;
    if (few_rows) return {1, 4, 2, 64, chunk, resident, false, 2, half ? 4 : 3, half ? 4 : 1};
    if (half && resident == 1) return {4, 1, 2, 64, chunk, resident, true, 2, 2, chunk / 16};
    return {half && walked ? 8 : 4, 1, 1, 64, chunk, resident, false, 2, 2, half ? 4 : 1};
}

// Columns of the embedding that a warp of the backward kernels holds, a few in each lane; longer embeddings are cut.
constexpr int gradient_dimension(int64_t dimension) { return dimension <= 64 ? 64 : 128; }

constexpr int kQueryGradientThreads = 256;

// A tile of a document's tokens with its sums in shared memory, and query tokens looked through at a time. Two blocks
// fit 163 KB.
struct DocumentGradientTiles {
    int warps, tokens, scan, min_blocks;
};

constexpr DocumentGradientTiles document_gradient_tiles(int dimension) { return {8, 8192 / dimension, 4096, 2}; }

}  // namespace jmlr::maxsim
