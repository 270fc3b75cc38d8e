// What the parts of the emulator share: the blocks that run at the same time, their fibers and their memory.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kNobody = -1;

struct AsyncCopy {
    int offset;
    const void* from;
    bool valid;
};

// `waiting`: for something that hopper_emulator.h knows about.
enum class State { ready, meeting, barrier, cluster, waiting, finished };

struct Reason {
    const char* what = nullptr;
    int64_t first = 0, second = 0;
};

struct Fiber {
    char* stack = nullptr;
    void* top = nullptr;
    void* sanitizer = nullptr;
    State state = State::ready;
    const void* waiting_for = nullptr;
    Reason reason;
    std::vector<AsyncCopy> open;
    std::vector<std::vector<AsyncCopy>> groups;
};

struct Warp {
    int arrived = 0;
    Meeting kind = Meeting::barrier;
    void* slots[kWarp];
    uint32_t epoch = 0;
};

struct Access {
    int thread = kNobody;        // or kSeveralWarps, of reads
    bool several_lanes = false;  // of the thread's warp, of reads
    uint32_t epoch = 0;
    uint32_t warp_epoch = 0;
};

// Two bytes of shared memory.
struct Cell {
    Access write, read;
    int copying = kNobody;
};

struct Hopper;  // hopper_block.h

struct Block {
    const std::function<void()>* kernel = nullptr;
    Grid grid{};
    int64_t index = 0;
    int rank = 0;  // in its cluster
    uint32_t epoch = 1;
    uint32_t cluster_epoch = 1;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char> shared;
    std::vector<Cell> cells;
    int running = 0;
    std::shared_ptr<Hopper> hopper;  // once it uses any of it

    bool ended() const;
};

// The blocks of a cluster, which run at the same time, and the one of them whose fiber runs.
extern std::vector<std::unique_ptr<Block>> cluster;
extern Block* block;
extern std::vector<int64_t> products;

[[noreturn]] void fail(const std::string& what, int thread);
[[noreturn]] void fail(const std::string& what);

// What each launch writes has new owners.
void begin_launch();

std::string place(int offset);
void check_arrived(int cell, int thread);
void check_shared_place(int offset, int bytes, int alignment, int thread);

// Leaves the calling fiber until `wake`.
void wait_for(const void* what, const Reason& reason);
void wake(Block& of, const void* what);
void leave(State state);

}  // namespace emulator
