// jmlr_native::shifted_attention_tile_sizes: what the CUDA kernels multiply at a time, for whoever counts it
// (jmlr_kernels/shifted_attention/executed.py). It is there in builds without CUDA too.

#include "../tensors.h"
#include "sm90_tiles.h"
#include "tile_sizes.h"

namespace jmlr::shifted_attention {
namespace {

// Columns of a tile; then block_m, block_n and parts of the forward kernel, of dq's, and of dk's and dv's.
std::vector<int64_t> reported_tile_sizes(int64_t element_bytes, int64_t head_dim, int64_t shared_bytes) {
    check(element_bytes == 2 || element_bytes == 4, "the compiled kernels take elements of 2 or 4 bytes, not ",
          element_bytes);
    check(head_dim >= 1 && head_dim <= kWidestHead, "the compiled kernels take heads of 1 to ", kWidestHead,
          " dimensions, not ", head_dim);
    const int block_d = block_d_of(head_dim);
    std::vector<int64_t> reported{block_d};
    for (Kernel kernel : {Kernel::forward, Kernel::backward_dq, Kernel::backward_dkdv}) {
        const TileSizes sizes = tile_sizes(kernel, int(element_bytes), block_d, tiles::class_of(shared_bytes));
        reported.insert(reported.end(), {sizes.block_m, sizes.block_n, sizes.parts});
    }
    return reported;
}

// Of the kernels for compute capability 9.0: columns of a head; then rows of a block and rows that it streams, of the
// forward kernel, of dq's, and of dk's and dv's, the latter two only where they take such a head.
std::vector<int64_t> reported_hopper_tiles(int64_t head_dim) {
    if (head_dim < 8 || head_dim % 8 != 0 || head_dim > sm90::kWidestHead) return {0};
    const int block_d = sm90::block_d_of(head_dim);
    const auto forward = sm90::forward_tiles(block_d);
    const auto dq = sm90::backward_dq_tiles(block_d), dkdv = sm90::backward_dkdv_tiles(block_d);
    if (head_dim > sm90::kWidestBackwardHead) return {block_d, 64 * forward.warpgroups, forward.keys};
    return {block_d,     64 * forward.warpgroups, forward.keys, 64 * dq.warpgroups,
            dq.streamed, 64 * dkdv.warpgroups,    dkdv.streamed};
}

}  // namespace
}  // namespace jmlr::shifted_attention

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CompositeExplicitAutograd, library) {
    library.impl("shifted_attention_tile_sizes", TORCH_BOX(&jmlr::shifted_attention::reported_tile_sizes));
    library.impl("shifted_attention_hopper_tiles", TORCH_BOX(&jmlr::shifted_attention::reported_hopper_tiles));
}
