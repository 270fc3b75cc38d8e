// A GPU's block of threads on a CPU, for tests: every CUDA thread is a fiber with its own stack, and a fiber runs until
// it must wait for others. Warp-wide instructions are meetings of 32 fibers; barriers are meetings of the whole block.
//
// Checked on the way, each a Violation that names block, thread and place:
// - global memory: inside a registered tensor, aligned, outputs alone written, each element by one owner;
// - shared memory: inside the block's allocation, aligned, written before it is read, and no two threads at one place
//   without a barrier in between when one of them writes (between lanes of a warp, a warp barrier);
// - asynchronous copies: nobody touches their target before the wait, and they arrive as late as they may;
// - barriers and warp-wide instructions: all threads arrive, at the same one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The last five: hopper_emulator.h.
enum class Meeting {
    load_matrices,
    multiply_add,
    shuffle,
    ballot,
    warp,
    barrier,
    named_barrier,
    registers,
    open_products,
    close_products,
    wait_products
};

// What the calling fiber is.
int thread_index();
int64_t block_index();
int64_t block_count();

void sync_block();
void sync_warp();

// All lanes of the calling warp meet; `compute` runs once, with the 32 pointers in lane order.
void meet(Meeting kind, void* slot, const std::function<void(void**)>& compute);

// `alignment` 0 stands for `bytes`.
void check_global_read(const void* pointer, size_t bytes, size_t alignment = 0);
void check_global_write(const void* pointer, size_t bytes, size_t alignment = 0);

// The bytes at an offset of the block's shared memory, after the checks; `by_lane` attributes the access to another
// lane of the calling warp, `alignment` 0 stands for `bytes`.
const void* shared_read(int offset, int bytes, int by_lane = -1, int alignment = 0);
void* shared_write(int offset, int bytes);

void copy_async(int offset, const void* from, bool valid);
void commit_copies();
void wait_copies(int groups_under_way);

// The GPU that the calling thread speaks to: its number, and how much shared memory a block may ask for, in bytes
// (device.cpp).
void set_device(int number, int shared_limit);
int device();
int shared_limit();

// A kernel's blocks get more than 48 KB only on devices where this was called for it, and never more than the limit.
void allow_shared_memory(const void* kernel, int bytes);
void check_shared_memory(const void* kernel, int bytes);

struct Grid {
    int64_t blocks;
    int threads;
    int shared_bytes;
    int cluster = 1;     // blocks that run at the same time
    int min_blocks = 1;  // that the registers are cut for
};

// Runs `kernel` in every thread of every block, clusters of blocks in an order drawn from the seed. Throws the first
// Violation.
void run_grid(const std::function<void()>& kernel, const Grid& grid);

// Global memory that kernels may touch until `forget_tensors`. Overlapping registrations are allowed for inputs only.
void register_tensor(const void* data, size_t bytes, bool writable, const std::string& name);
void forget_tensors();
void set_seed(uint64_t seed);

// Products of the tensor cores (16 rows, 8 columns) that each launch made since the last call.
std::vector<int64_t> take_products();

}  // namespace emulator
