// What a kernel may do besides arithmetic on its registers. A kernel never follows a pointer itself: global and shared
// memory are reached through these functions alone, so that the host build sees every access.
//
//   thread_index()  lane()  warp()                 within the block, which is one-dimensional; all lanes call warp()
//   block_index()  block_count()                   within the grid, one-dimensional
//   sync_block()  sync_warp()                      barriers that also order memory
//   load(pointer)  store(pointer, value)           global memory; 1 to 16 bytes, aligned to their size
//   Shared<T>                                      a pointer into the block's shared memory: + n, read(n),
//                                                  write(n, value)
//   shared_memory<T>(bytes)                        Shared<T> at a byte offset
//   copy_async(shared, global, valid)              16 bytes, both sides aligned to 16; zeros if not valid, and then
//                                                  `global` is not read. Visible to the thread itself after a wait, to
//                                                  the others after a wait and a barrier.
//   commit_copies()  wait_copies<n>()              close a group of copies; wait until at most n groups are under way
//   shuffle_xor(value, mask)  shuffle(value, lane)  ballot(bit)   among the 32 lanes, all of which must call them
//   count_bits(bits)  lowest_bit(bits)             how many are set; the number of the lowest, -1 without any
//   load_matrices(registers, row)                  ldmatrix: four 8 x 8 matrices of 16-bit elements; lane l gives the
//                                                  address of row l % 8 of matrix l / 8; load_matrices_transposed too
//   multiply_add<Element>(c, a, b)                 mma.sync: c[16, 8] += a[16, K] b[K, 8]; K = 16, for tf32 8
#pragma once

#include "numbers.h"
#include "platform.h"

namespace tiles {

// Operands of the tensor cores that are 32 bits wide.
struct Tf32 {};

// 16 bytes, the widest access.
struct alignas(16) Chunk {
    uint32_t word[4];
};

}  // namespace tiles

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
#include "primitives_cuda.h"
#else
#include "primitives_host.h"
#endif
