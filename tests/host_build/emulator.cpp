#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "hopper_block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks by hand, for x86-64 alone"
#endif

// Saves the callee's registers on the present stack, leaves its address in *from and goes on where `to` was left.
extern "C" void jmlr_switch_stack(void** from, void* to);
asm(R"(
.text
.globl jmlr_switch_stack
.type jmlr_switch_stack, @function
jmlr_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size jmlr_switch_stack, .-jmlr_switch_stack
)");

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;

std::vector<char*> stacks;
uint64_t seed = 0;
std::string first_error;

// What runs the fibers, on the stack of run_grid.
void* scheduler = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
#endif

}  // namespace

std::vector<std::unique_ptr<Block>> cluster;
Block* block = nullptr;
std::vector<int64_t> products;

bool Block::ended() const {
    return std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::finished; });
}

void fail(const std::string& what, int thread) {
    throw Violation(what + " (block " + std::to_string(block->index) + ", thread " + std::to_string(thread) + ")");
}

void fail(const std::string& what) { fail(what, block->running); }

namespace {

void switch_to_scheduler(Fiber& fiber, bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.sanitizer, scheduler_stack, scheduler_size);
#else
    (void)last;
#endif
    jmlr_switch_stack(&fiber.top, scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.sanitizer, nullptr, nullptr);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    Fiber& fiber = block->fibers[block->running];
    try {
        (*block->kernel)();
        if (!fiber.open.empty() || !fiber.groups.empty()) fail("a thread ends with asynchronous copies under way");
        if (block->hopper) end_thread();
    } catch (const std::exception& error) {
        if (first_error.empty()) first_error = error.what();
    }
    fiber.state = State::finished;
    switch_to_scheduler(fiber, true);
    std::abort();
}

void resume(int thread) {
    Fiber& fiber = block->fibers[thread];
    block->running = thread;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack, kStack);
#endif
    jmlr_switch_stack(&scheduler, fiber.top);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

void prepare(int thread) {
    int number = block->rank * block->grid.threads + thread;
    while (int(stacks.size()) <= number) {
        void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks.push_back(static_cast<char*>(memory));
    }
    Fiber& fiber = block->fibers[thread];
    fiber.stack = stacks[number];
#if defined(__SANITIZE_ADDRESS__)
    // A block that ended in a Violation has left its frames there.
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    // Six registers and the address that the switch returns to; the latter at a multiple of 16, as after a call.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    *top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    fiber.top = top - 6;
}

void start_block(const std::function<void()>& kernel, const Grid& grid, int64_t index, int rank) {
    block = cluster[rank].get();
    block->kernel = &kernel;
    block->grid = grid;
    block->index = index;
    block->rank = rank;
    block->epoch = block->cluster_epoch = 1;
    block->shared.assign(grid.shared_bytes, char(0xff));
    block->cells.assign(block->shared.size() / 2, Cell());
    block->warps.assign(grid.threads / kWarp, Warp());
    block->fibers.assign(grid.threads, Fiber());
    block->hopper.reset();
    for (int thread = 0; thread < grid.threads; ++thread) prepare(thread);
}

// Until each of its lanes waits for something.
void run_warp(Block& own, int warp) {
    block = &own;
    for (bool any = true; any;) {
        any = false;
        for (int lane = 0; lane < kWarp; ++lane) {
            if (own.fibers[warp * kWarp + lane].state != State::ready) continue;
            any = true;
            resume(warp * kWarp + lane);
            if (!first_error.empty()) throw Violation(first_error);
        }
    }
}

bool anybody_ready() {
    for (const auto& own : cluster) {
        for (const Fiber& fiber : own->fibers) {
            if (fiber.state == State::ready) return true;
        }
    }
    return false;
}

// Lets the threads of a block go on that all wait at its barrier.
bool release_barriers() {
    bool any = false;
    for (const auto& own : cluster) {
        auto waits = [](const Fiber& fiber) { return fiber.state == State::barrier; };
        if (!std::all_of(own->fibers.begin(), own->fibers.end(), waits)) continue;
        ++own->epoch;
        if (own->hopper) own->hopper->actors.exchange(own->rank, 0, own->grid.threads);
        for (Fiber& fiber : own->fibers) fiber.state = State::ready;
        any = true;
    }
    return any;
}

// The same of a cluster: those that have ended are not waited for.
bool release_cluster() {
    bool any = false;
    for (const auto& own : cluster) {
        for (const Fiber& fiber : own->fibers) {
            if (fiber.state != State::cluster && fiber.state != State::finished) return false;
            any |= fiber.state == State::cluster;
        }
    }
    for (const auto& own : cluster) {
        if (any) ++own->epoch, ++own->cluster_epoch;
        for (Fiber& fiber : own->fibers) {
            if (fiber.state == State::cluster) fiber.state = State::ready;
        }
    }
    if (any) cluster[0]->hopper->actors.exchange_all();
    return any;
}

[[noreturn]] void report_stuck() {
    for (const auto& own : cluster) {
        block = own.get();
        int finished = 0, waiting = 0, stuck = kNobody, blocked = kNobody;
        for (int thread = 0; thread < own->grid.threads; ++thread) {
            State state = own->fibers[thread].state;
            finished += state == State::finished;
            waiting += state == State::barrier;
            if (state == State::meeting && stuck == kNobody) stuck = thread;
            if ((state == State::waiting || state == State::cluster) && blocked == kNobody) blocked = thread;
        }
        if (blocked != kNobody) fail("deadlock: " + who_waits(), blocked);
        if (stuck != kNobody) fail("a warp-wide instruction that not all lanes reach", stuck);
        if (waiting > 0) {
            fail(std::to_string(waiting) + " threads wait at a barrier and " + std::to_string(finished) +
                 " have ended");
        }
    }
    std::abort();
}

void run_cluster(const std::function<void()>& kernel, const Grid& grid, int64_t first) {
    for (int rank = 0; rank < grid.cluster; ++rank) start_block(kernel, grid, first + rank, rank);
    copies.clear();
    std::mt19937_64 random(seed * 1000003 + uint64_t(first));
    std::vector<std::pair<int, int>> order;  // rank, warp
    for (int rank = 0; rank < grid.cluster; ++rank) {
        for (int warp = 0; warp < grid.threads / kWarp; ++warp) order.emplace_back(rank, warp);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        for (auto [rank, warp] : order) run_warp(*cluster[rank], warp);
        early_copies(random);
        if (anybody_ready() || release_barriers() || release_cluster()) continue;
        if (std::all_of(cluster.begin(), cluster.end(), [](const auto& own) { return own->ended(); })) break;
        if (!late_copy(random)) report_stuck();
    }
    end_cluster();
}

}  // namespace

int thread_index() { return block->running; }
int64_t block_index() { return block->index; }
int64_t block_count() { return block->grid.blocks; }

void leave(State state) {
    Fiber& fiber = block->fibers[block->running];
    fiber.state = state;
    switch_to_scheduler(fiber, false);
}

void wait_for(const void* what, const Reason& reason) {
    Fiber& fiber = block->fibers[block->running];
    fiber.waiting_for = what;
    fiber.reason = reason;
    leave(State::waiting);
}

void wake(Block& of, const void* what) {
    for (Fiber& fiber : of.fibers) {
        if (fiber.state == State::waiting && fiber.waiting_for == what) fiber.state = State::ready;
    }
}

void sync_block() { leave(State::barrier); }

void meet(Meeting kind, void* slot, const std::function<void(void**)>& compute) {
    int thread = block->running;
    Warp& warp = block->warps[thread / kWarp];
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) fail("lanes of a warp meet at different warp-wide instructions");
    warp.slots[thread % kWarp] = slot;
    if (++warp.arrived < kWarp) {
        leave(State::meeting);
        return;
    }
    warp.arrived = 0;
    products.back() += kind == Meeting::multiply_add;
    compute(warp.slots);
    for (int lane = 0; lane < kWarp; ++lane) block->fibers[thread / kWarp * kWarp + lane].state = State::ready;
}

void sync_warp() {
    Warp& warp = block->warps[block->running / kWarp];
    meet(Meeting::barrier, nullptr, [&warp](void**) {
        ++warp.epoch;
        if (block->hopper) block->hopper->actors.exchange(block->rank, block->running / kWarp * kWarp, kWarp);
    });
}

void run_grid(const std::function<void()>& kernel, const Grid& grid) {
    if (grid.threads % kWarp != 0 || grid.threads <= 0 || grid.threads > 1024)
        throw Violation("a block has 32 to 1024 threads, whole warps");
    if (grid.cluster < 1 || grid.cluster > 8 || grid.blocks % grid.cluster != 0)
        throw Violation("a cluster has 1 to 8 blocks, a grid whole clusters");
    begin_launch();
    products.push_back(0);
    first_error.clear();
    struct Leave {
        ~Leave() {
            cluster.clear();
            block = nullptr;
        }
    } leave;
    while (int(cluster.size()) < grid.cluster) cluster.push_back(std::make_unique<Block>());
    std::vector<int64_t> order(static_cast<size_t>(grid.blocks / grid.cluster));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t index : order) run_cluster(kernel, grid, index * grid.cluster);
}

void set_seed(uint64_t value) { seed = value; }

std::vector<int64_t> take_products() { return std::exchange(products, {}); }

}  // namespace emulator
