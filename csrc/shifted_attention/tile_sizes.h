// All tuning of the kernels: one pure function of what is known when they are compiled.
#pragma once

#include "../tiles/platform.h"

namespace jmlr::shifted_attention {

using tiles::SharedMemory;

enum class Kernel { forward, backward_dq, backward_dkdv };

struct TileSizes {
    int block_m, block_n;  // queries and keys of a tile
    int bands;             // of 16 rows that a warp owns: a fragment that it loads serves all of them
    int parts;             // warps that share rows, and divide the columns of what these sum up
    int unroll;            // steps of a product over the columns of a head that are written out
    int min_blocks = 1;    // that shall share a multiprocessor, which limits registers
};

constexpr bool operator==(TileSizes a, TileSizes b) {
    return a.block_m == b.block_m && a.block_n == b.block_n && a.bands == b.bands && a.parts == b.parts &&
           a.unroll == b.unroll && a.min_blocks == b.min_blocks;
}

constexpr int64_t kWidestHead = 256;

// Columns of a tile that holds a head's.
constexpr int block_d_of(int64_t head_dim) {
    return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}

// Chosen so that nothing spills and two stages of tiles fit the shared memory, and then so that few blocks read the
// same rows and few warps the same fragments. The small choices stream half as much at a time, which costs barriers and
// fragments loaded for fewer products, or own half the rows: so the large ones stay where there is room. No choice has
// been timed.
constexpr TileSizes tile_sizes(Kernel kernel, int element_bytes, int block_d, SharedMemory shared) {
    bool wide = element_bytes == 4, small = shared == SharedMemory::small;
    switch (kernel) {
        case Kernel::forward:
            if (wide && block_d <= 32) return {64, 32, 1, 1, 4};
            if (wide) return block_d <= 128 ? TileSizes{64, 16, 1, 1, 4} : TileSizes{64, 16, 1, 2, 4};
            if (block_d <= 128) return block_d <= 96 ? TileSizes{128, 64, 2, 1, 4} : TileSizes{128, 32, 2, 1, 8};
            return small ? TileSizes{128, 32, 1, 1, 4} : TileSizes{128, 64, 1, 1, 4};
        case Kernel::backward_dq:
            if (wide && block_d <= 32) return {64, 32, 1, 1, 2};
            if (wide && block_d <= 128) return {64, 16, 1, 1, 2};
            if (wide) return small ? TileSizes{16, 16, 1, 4, 2} : TileSizes{32, 16, 1, 2, 2};
            if (block_d <= 64) return block_d <= 32 ? TileSizes{128, 64, 2, 1, 2} : TileSizes{128, 32, 2, 1, 2};
            if (block_d <= 96) return {128, 64, 1, 1, 2};
            if (block_d <= 128) return small ? TileSizes{128, 32, 1, 1, 2} : TileSizes{128, 64, 1, 1, 2};
            return small ? TileSizes{64, 16, 1, 1, 2} : TileSizes{64, 32, 1, 1, 2};
        default:
            if (wide && block_d <= 64) return {32, 64, 1, 1, 2};
            if (wide && block_d <= 128) return block_d <= 96 ? TileSizes{16, 64, 1, 1, 2} : TileSizes{16, 64, 1, 2, 2};
            if (wide) return small ? TileSizes{16, 16, 1, 4, 2} : TileSizes{16, 32, 1, 4, 2};
            if (block_d <= 64) return block_d <= 32 ? TileSizes{64, 128, 2, 1, 2} : TileSizes{32, 128, 2, 1, 2};
            if (block_d <= 96) return {64, 128, 1, 1, 2};
            if (block_d <= 128) return small ? TileSizes{32, 128, 1, 1, 2} : TileSizes{64, 128, 1, 1, 2};
            return small ? TileSizes{16, 64, 1, 2, 2} : TileSizes{32, 64, 1, 2, 2};
    }
}

// The class that a kernel is compiled for: where both have the same tiles, the small one alone.
constexpr SharedMemory compiled_class(Kernel kernel, int element_bytes, int block_d, SharedMemory shared) {
    constexpr SharedMemory kSmall = SharedMemory::small;
    bool same =
        tile_sizes(kernel, element_bytes, block_d, shared) == tile_sizes(kernel, element_bytes, block_d, kSmall);
    return same ? kSmall : shared;
}

// The rows that a block owns are queries, but keys in backward_dkdv.
constexpr int rows_of_block(Kernel kernel, TileSizes sizes) {
    return kernel == Kernel::backward_dkdv ? sizes.block_n : sizes.block_m;
}

constexpr int threads_of(Kernel kernel, TileSizes sizes) {
    return rows_of_block(kernel, sizes) / (16 * sizes.bands) * sizes.parts * tiles::kWarp;
}

}  // namespace jmlr::shifted_attention
