// The state of a block that uses hopper_emulator.h, and what the emulator's scheduler asks of it.
#pragma once

#include <array>
#include <map>
#include <utility>

#include "emulated_block.h"
#include "happens_before.h"
#include "hopper_emulator.h"

namespace emulator {

struct PhaseBarrier {
    int offset = 0, number = 0, arrivals = 0, pending = 0;
    int64_t bytes = 0;  // expected and not there yet; below zero while they came before they were expected
    uint64_t phase = 0;
    int maker = kNobody;
    uint32_t made_in = 0, made_in_cluster = 0;  // epochs of the block
    bool fenced = false;
    Clock gathering, told;  // of those that arrive in this phase, and have arrived in earlier ones
};

struct NamedBarrier {
    int threads = 0;
    std::vector<std::pair<int, bool>> warps;  // that have arrived, and whether they wait
    uint64_t generation = 0;
    Clock gathering;
};

struct Store {
    TensorMap map;
    int offset;
    Coordinates to;
};

// An accumulator between a product and its wait: what it will hold, and the last group that adds to it.
struct UnderWay {
    float* c;
    int64_t group;
    std::vector<float> values;
};

struct ThreadState {
    std::vector<Store> open_stores;
    std::vector<std::vector<Store>> stores;
    std::vector<const float*> opened;
    std::vector<UnderWay> under_way;
    std::vector<std::pair<const uint32_t*, std::array<uint32_t, 4>>> a_registers;  // of products since open_products
};

struct WarpState {
    int64_t closed = 0;     // groups of products
    int64_t completed = 0;  // of them
    int registers = 0;
    int wanted = 0;
    std::vector<int> settings;
};

struct Gathering {
    int arrived = 0;
    std::array<const Product*, kWarpgroup> products;
};

struct Hopper {
    Hopper(Actors& actors, const Block& block);

    Actors& actors;  // of the cluster
    Accesses accesses;
    std::map<int, PhaseBarrier> barriers;  // by offset
    std::array<NamedBarrier, 16> named;
    int free_registers = 0;
    std::vector<ThreadState> threads;
    std::vector<WarpState> warps;
    std::vector<Gathering> warpgroups;
};

// The calling block's; made at the first call, for all of the cluster.
Hopper& hopper();

// The calling thread's.
Mark now();
const Clock& heard();

// A copy that has been issued.
struct BoxCopy {
    Block* into;
    int offset, bytes, barrier, thread;
    TensorMap map;  // data is null for plain bytes
    Coordinates from;
    const char* plain;
};
extern std::vector<BoxCopy> copies;

// The bytes at an offset, for a product or a store of a box.
const void* read_fenced(int offset, int bytes, Mark by, const Clock& heard);

// Whether a thread of another block of the cluster may use a barrier of this one; throws if not.
PhaseBarrier& usable_from_afar(Block& of, int barrier);

// Of the block that a copy goes into: what the bytes are marked with that come in now, and their count.
Mark phase_mark(int barrier, int thread);
void complete_bytes(int barrier, int bytes, int thread);

// The scheduler's: some copies arrive early, one arrives because nobody can go on without it.
void early_copies(std::mt19937_64& random);
bool late_copy(std::mt19937_64& random);
void end_thread();
void end_cluster();
std::string who_waits();

}  // namespace emulator
