// What compute capability 9.0 adds to the emulated block (csrc/tiles/hopper.h), as late and as strictly as a GPU may
// have it. A block changes over to it at the first of these calls.
//
// Checked on the way, each a Violation that names block, thread and place:
// - barriers: made once, known to all before they are used, as many arrivals and bytes as they expect, nothing left
// over
//   when a block ends; where nobody can run any more, who waits for what;
// - copies of boxes: aligned, of tensors of the call, into shared memory that nobody touches before they arrive, which
//   is when nobody could run without them, or at a moment drawn from the seed;
// - products: all warps of a warpgroup make the same one; descriptors are read as the PTX manual defines them; nobody
//   touches an accumulator between a product and the wait that names it (it holds NaN until then);
// - shared memory: every access comes after those it must not meet, by barriers that order the two
//   (happens_before.h), and what threads wrote themselves reaches products and stores of boxes through a fence_async();
// - registers that warpgroups take are there.
#pragma once

#include "emulator.h"

namespace emulator {

struct TensorMap {
    static constexpr int kMostAxes = 4;
    const char* data;
    int element_bytes, axes;
    int64_t sizes[kMostAxes];
    uint64_t stride_bytes[kMostAxes];  // the first: of an element
    int box[kMostAxes];

    int box_bytes() const;
};
static_assert(sizeof(TensorMap) <= 128);

// Offsets are those of the block's shared memory, which does not begin at address 0.
uint32_t shared_address(int offset);

void init_barrier(int offset, int arrivals);
void fence_barriers();
void arrive(int offset, int expected_bytes);
void arrive_at(int offset, int rank);
void wait_barrier(int offset, int parity);

struct Coordinates {
    int count;
    int at[TensorMap::kMostAxes];
};

// `blocks`: a bit for each block of the cluster; 0 stands for the calling one.
void copy_box(unsigned blocks, int offset, const TensorMap& map, int barrier, const Coordinates& from);
void copy_bytes(int offset, const void* from, int bytes, int barrier);
void store_box(const TensorMap& map, int offset, const Coordinates& to);
void commit_stores();
void wait_stores(int groups_under_way);
void fence_async();

enum class Number { half, bfloat16, float8 };

struct Product {
    Number number;
    int columns;
    bool outer_a, outer_b, accumulate;
    const uint32_t* a_registers;  // or nullptr
    uint64_t a, b;                // descriptors
    float* c;                     // [columns / 8][4]
};

struct Accumulator {
    float* c;
    int size;
};

void open_products(const Accumulator* c, int count);
void multiply_async(const Product& product);
void close_products();
void wait_products(int groups_under_way, const Accumulator* c, int count);

void set_registers(int count, bool taking);
void sync_threads_of(int id, int threads);
void arrive_for(int id, int threads);
int cluster_rank();
int cluster_size();
void sync_cluster();

}  // namespace emulator
