// Barriers of every kind, registers that warpgroups hand over, and what must be in order when a block ends.
#include "hopper_emulator.h"

#include <algorithm>

#include "hopper_block.h"

namespace emulator {
namespace {

constexpr int kRegisters = 65536;           // of a multiprocessor
constexpr int kMostRegisters = 256;         // of a thread, as they are handed out
constexpr int64_t kMostBytes = 1 << 20;     // that a phase of a barrier can count
constexpr uint32_t kSharedAddress = 0x400;  // of the first byte: the system keeps what lies before

std::string barrier_at(int offset) { return "the barrier at " + place(offset); }

Hopper make_hopper() {
    Hopper made;
    int threads = block->grid.threads, warps = threads / kWarp;
    int each = std::min(kRegisters / block->grid.min_blocks / threads / 8 * 8, kMostRegisters);
    made.threads.resize(threads);
    made.warps.resize(warps);
    for (WarpState& warp : made.warps) warp.registers = each;
    made.warpgroups.resize((threads + kWarpgroup - 1) / kWarpgroup);
    return made;
}

// For the calling thread, after the checks that every use of a barrier has to pass.
PhaseBarrier& usable(int offset) {
    auto found = hopper().barriers.find(offset);
    if (found == hopper().barriers.end()) fail(barrier_at(offset) + " is used before its init");
    PhaseBarrier& barrier = found->second;
    if (barrier.maker != block->running && (!barrier.fenced || barrier.made_in == block->epoch)) {
        fail(barrier_at(offset) + " is used by another thread than made it without " +
             (barrier.fenced ? "a barrier of the block in between" : "fence_barriers()"));
    }
    return barrier;
}

void advance(Block& of, PhaseBarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    if (barrier.bytes < 0) {
        fail(std::to_string(-barrier.bytes) + " bytes more than " + barrier_at(barrier.offset) + " expects have come");
    }
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    wake(of, &barrier);
}

void count_arrival(Block& of, PhaseBarrier& barrier) {
    if (barrier.pending == 0) {
        fail("more arrivals than the " + std::to_string(barrier.arrivals) + " that " + barrier_at(barrier.offset) +
             " expects of a phase");
    }
    --barrier.pending;
    advance(of, barrier);
}

// `threads` of all of a warp's lanes arrive; its generation before.
uint64_t arrive_at_named(int id, int threads) {
    if (id < 1 || id > 15) fail("named barriers are 1 to 15, not " + std::to_string(id));
    if (threads <= 0 || threads % kWarp != 0 || threads > block->grid.threads)
        fail("named barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads");
    NamedBarrier& barrier = hopper().named[id];
    uint64_t generation = 0;
    std::pair<int, int> own{id, threads};
    struct Slot {
        std::pair<int, int>* own;
        uint64_t* generation;
    } slot{&own, &generation};
    int warp = block->running / kWarp;
    meet(Meeting::named_barrier, &slot, [&barrier, id, threads, warp](void** slots) {
        for (int lane = 0; lane < kWarp; ++lane) {
            Slot* each = static_cast<Slot*>(slots[lane]);
            if (*each->own != std::pair<int, int>{id, threads})
                fail("lanes of a warp meet at different named barriers");
            *each->generation = barrier.generation;
        }
        if (!barrier.warps.empty() && barrier.threads != threads) {
            fail("named barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads and for " +
                 std::to_string(barrier.threads));
        }
        if (std::count(barrier.warps.begin(), barrier.warps.end(), warp) > 0)
            fail("a warp arrives twice at named barrier " + std::to_string(id));
        barrier.threads = threads;
        barrier.warps.push_back(warp);
        if (int(barrier.warps.size()) * kWarp < threads) return;
        barrier.warps.clear();
        ++barrier.generation;
        wake(*block, &barrier);
    });
    return generation;
}

void grant_registers() {
    Hopper& own = hopper();
    for (WarpState& warp : own.warps) {
        int more = (warp.wanted - warp.registers) * kWarp;
        if (warp.wanted == 0 || more > own.free_registers) continue;
        own.free_registers -= more;
        warp.registers = warp.wanted;
        warp.wanted = 0;
        wake(*block, &warp);
    }
}

}  // namespace

Hopper& hopper() {
    if (!block->hopper) block->hopper = std::make_shared<Hopper>(make_hopper());
    return *block->hopper;
}

uint32_t shared_address(int offset) { return kSharedAddress + uint32_t(offset); }

void init_barrier(int offset, int arrivals) {
    check_shared_place(offset, 8, 8, block->running);
    if (arrivals < 1 || arrivals >= kMostBytes) fail("a barrier for " + std::to_string(arrivals) + " arrivals");
    auto [found, made] = hopper().barriers.try_emplace(offset);
    if (!made) fail(barrier_at(offset) + " is made twice");
    PhaseBarrier& barrier = found->second;
    barrier.offset = offset;
    barrier.arrivals = barrier.pending = arrivals;
    barrier.maker = block->running;
    barrier.made_in = block->epoch;
}

void fence_barriers() {
    for (auto& each : hopper().barriers) each.second.fenced |= each.second.maker == block->running;
}

void arrive(int offset, int expected_bytes) {
    PhaseBarrier& barrier = usable(offset);
    barrier.bytes += expected_bytes;
    if (expected_bytes < 0 || barrier.bytes >= kMostBytes)
        fail(barrier_at(offset) + " cannot count " + std::to_string(barrier.bytes) + " bytes");
    count_arrival(*block, barrier);
}

void wait_barrier(int offset, int parity) {
    PhaseBarrier& barrier = usable(offset);
    if (parity != 0 && parity != 1) fail("the parity of a phase is 0 or 1, not " + std::to_string(parity));
    while (int(barrier.phase & 1) == parity) wait_for(&barrier, Reason{"barrier", offset, parity});
}

void complete_bytes(Block& of, int offset, int bytes, int thread) {
    block = &of;
    block->running = thread;
    auto found = hopper().barriers.find(offset);
    if (found == hopper().barriers.end()) fail("a copy tells " + barrier_at(offset) + ", which is not there");
    if (!found->second.fenced) fail("a copy tells " + barrier_at(offset) + ", made without fence_barriers()");
    found->second.bytes -= bytes;
    if (found->second.bytes <= -kMostBytes) fail(barrier_at(offset) + " cannot count so many bytes");
    advance(of, found->second);
}

const void* read_for_product(int offset, int bytes) { return shared_read(offset, bytes); }
void fence_async() { hopper(); }

void sync_cluster() { fail("clusters are not there yet"); }
void arrive_at(int, int) { fail("clusters are not there yet"); }

void set_registers(int count, bool taking) {
    Hopper& own = hopper();
    int number = block->running / kWarp;
    WarpState& warp = own.warps[number];
    meet(Meeting::registers, &count, [&](void** slots) {
        for (int lane = 0; lane < kWarp; ++lane) {
            if (*static_cast<int*>(slots[lane]) != count)
                fail("lanes of a warp ask for different numbers of registers");
        }
        warp.settings.push_back(count);
        for (int other = number / 4 * 4; other < std::min(number / 4 * 4 + 4, int(own.warps.size())); ++other) {
            const std::vector<int>& theirs = own.warps[other].settings;
            if (theirs.size() >= warp.settings.size() && theirs[warp.settings.size() - 1] != count)
                fail("warps of a warpgroup ask for different numbers of registers");
        }
        if (taking ? count < warp.registers : count > warp.registers) {
            fail(std::string("a thread of ") + std::to_string(warp.registers) + " registers " +
                 (taking ? "takes until it has " : "gives until it has ") + std::to_string(count));
        }
        if (taking) {
            warp.wanted = count;
        } else {
            own.free_registers += (warp.registers - count) * kWarp;
            warp.registers = count;
        }
        grant_registers();
    });
    while (warp.wanted != 0) wait_for(&warp, Reason{"registers", count, own.free_registers});
}

void sync_threads_of(int id, int threads) {
    uint64_t generation = arrive_at_named(id, threads);
    const NamedBarrier& barrier = hopper().named[id];
    while (barrier.generation == generation) wait_for(&barrier, Reason{"named barrier", id, threads});
}

void arrive_for(int id, int threads) { arrive_at_named(id, threads); }

int cluster_rank() { return block->rank; }
int cluster_size() { return block->grid.cluster; }

std::string who_waits() {
    std::string text;
    const std::vector<Fiber>& fibers = block->fibers;
    for (int first = 0, last; first < int(fibers.size()); first = last) {
        const Fiber& fiber = fibers[first];
        auto same = [&](const Fiber& other) {
            return other.state == fiber.state &&
                   (fiber.state != State::waiting ||
                    (other.waiting_for == fiber.waiting_for && other.reason.second == fiber.reason.second));
        };
        for (last = first; last < int(fibers.size()) && same(fibers[last]);) ++last;
        text += (text.empty() ? "threads " : "; threads ") + std::to_string(first) + " to " + std::to_string(last - 1);
        if (fiber.state == State::finished) text += " have ended";
        if (fiber.state == State::meeting) text += " are at a warp-wide instruction that not all lanes reach";
        if (fiber.state == State::barrier) text += " wait for the block";
        if (fiber.state != State::waiting) continue;
        const Reason& reason = fiber.reason;
        if (reason.what == std::string("barrier")) {
            const PhaseBarrier& barrier = block->hopper->barriers.at(int(reason.first));
            text += " wait for " + barrier_at(int(reason.first)) + " with parity " + std::to_string(reason.second) +
                    " (phase " + std::to_string(barrier.phase) + " lacks " + std::to_string(barrier.pending) +
                    " arrivals and " + std::to_string(barrier.bytes) + " bytes)";
        } else if (reason.what == std::string("registers")) {
            text += " wait for registers, " + std::to_string(reason.first) + " each, of which " +
                    std::to_string(block->hopper->free_registers) + " are free";
        } else {
            text += std::string(" wait for ") + reason.what + " " + std::to_string(reason.first) + ", for " +
                    std::to_string(reason.second) + " threads";
        }
    }
    return text;
}

void end_thread() {
    const ThreadState& thread = hopper().threads[block->running];
    if (!thread.open_stores.empty() || !thread.stores.empty()) fail("a thread ends with stores of boxes under way");
    if (!thread.under_way.empty()) fail("a thread ends with products under way");
}

void end_cluster() {
    for (const auto& own : cluster) {
        block = own.get();
        if (!block->hopper) continue;
        for (const BoxCopy& copy : copies) {
            if (copy.into == block)
                fail("a block ends with a copy to " + place(copy.offset) + " under way", copy.thread);
        }
        for (const auto& [offset, barrier] : block->hopper->barriers) {
            if (barrier.bytes != 0) {
                fail("a block ends while " + barrier_at(offset) + " waits for " + std::to_string(barrier.bytes) +
                         " bytes",
                     barrier.maker);
            }
        }
        for (size_t warp = 0; warp < block->hopper->warps.size(); ++warp) {
            size_t first = warp / 4 * 4;
            if (block->hopper->warps[warp].settings.size() != block->hopper->warps[first].settings.size())
                fail("not all warps of a warpgroup set their registers", int(warp) * kWarp);
        }
    }
}

}  // namespace emulator
