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
    // A later phase tells what the earlier ones did, too.
    barrier.told = barrier.gathering;
    barrier.told[of.hopper->actors.barrier(of.rank, barrier.number)] = uint32_t(barrier.phase);
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
uint64_t arrive_at_named(int id, int threads, bool waits) {
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
    meet(Meeting::named_barrier, &slot, [&barrier, id, threads, warp, waits](void** slots) {
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
        for (auto [other, their] : barrier.warps) {
            if (other == warp) fail("a warp arrives twice at named barrier " + std::to_string(id));
        }
        barrier.threads = threads;
        barrier.warps.emplace_back(warp, waits);
        Actors& actors = hopper().actors;
        for (int lane = 0; lane < kWarp; ++lane) actors.release(block->rank, warp * kWarp + lane, barrier.gathering);
        if (int(barrier.warps.size()) * kWarp < threads) return;
        for (auto [other, waiting] : barrier.warps) {
            for (int lane = 0; lane < kWarp && waiting; ++lane)
                actors.acquire(block->rank, other * kWarp + lane, barrier.gathering);
        }
        barrier.gathering.clear();
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

Hopper::Hopper(Actors& actors, const Block& block)
    : actors(actors),
      accesses(actors, block.cells.size()),
      threads(block.grid.threads),
      warps(block.grid.threads / kWarp),
      warpgroups((block.grid.threads + kWarpgroup - 1) / kWarpgroup) {
    int each = kRegisters / block.grid.min_blocks / block.grid.threads / 8 * 8;
    for (WarpState& warp : warps) warp.registers = std::min(each, kMostRegisters);
}

Hopper& hopper() {
    if (!block->hopper) {
        auto actors = std::make_shared<Actors>(int(cluster.size()), block->grid.threads);
        for (const auto& each : cluster) {
            // The actors live as long as the last of the blocks.
            each->hopper = std::shared_ptr<Hopper>(new Hopper(*actors, *each), [actors](Hopper* made) { delete made; });
        }
    }
    return *block->hopper;
}

Mark now() { return hopper().actors.now(block->rank, block->running); }
const Clock& heard() { return hopper().actors.clock(block->rank, block->running); }

const void* read_fenced(int offset, int bytes, Mark by, const Clock& heard) {
    check_shared_place(offset, bytes, 0, block->running);
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
        check_arrived(i, block->running);
        hopper().accesses.read_fenced(i, by, heard);
    }
    return block->shared.data() + offset;
}

void fence_async() { hopper().actors.fence_now(block->rank, block->running); }

uint32_t shared_address(int offset) { return kSharedAddress + uint32_t(offset); }

void init_barrier(int offset, int arrivals) {
    check_shared_place(offset, 8, 8, block->running);
    if (arrivals < 1 || arrivals >= kMostBytes) fail("a barrier for " + std::to_string(arrivals) + " arrivals");
    auto [found, made] = hopper().barriers.try_emplace(offset);
    if (!made) fail(barrier_at(offset) + " is made twice");
    PhaseBarrier& barrier = found->second;
    barrier.offset = offset;
    barrier.number = int(hopper().barriers.size()) - 1;
    if (barrier.number >= Actors::kBarriers) fail("more barriers than the emulator keeps apart");
    for (int i = offset / 2; i < offset / 2 + 4; ++i) hopper().accesses.hold(i, Accesses::kBarrier);
    barrier.arrivals = barrier.pending = arrivals;
    barrier.maker = block->running;
    barrier.made_in = block->epoch;
    barrier.made_in_cluster = block->cluster_epoch;
}

void fence_barriers() {
    for (auto& each : hopper().barriers) each.second.fenced |= each.second.maker == block->running;
}

void arrive(int offset, int expected_bytes) {
    PhaseBarrier& barrier = usable(offset);
    hopper().actors.release(block->rank, block->running, barrier.gathering);
    barrier.bytes += expected_bytes;
    if (expected_bytes < 0 || barrier.bytes >= kMostBytes)
        fail(barrier_at(offset) + " cannot count " + std::to_string(barrier.bytes) + " bytes");
    count_arrival(*block, barrier);
}

void wait_barrier(int offset, int parity) {
    PhaseBarrier& barrier = usable(offset);
    if (parity != 0 && parity != 1) fail("the parity of a phase is 0 or 1, not " + std::to_string(parity));
    while (int(barrier.phase & 1) == parity) wait_for(&barrier, Reason{"barrier", offset, parity});
    hopper().actors.acquire(block->rank, block->running, barrier.told);
}

Mark phase_mark(int offset, int thread) {
    auto found = hopper().barriers.find(offset);
    if (found == hopper().barriers.end()) fail("a copy tells " + barrier_at(offset) + ", which is not there", thread);
    const PhaseBarrier& barrier = found->second;
    if (!barrier.fenced) fail("a copy tells " + barrier_at(offset) + ", made without fence_barriers()", thread);
    return Mark{hopper().actors.barrier(block->rank, barrier.number), uint32_t(barrier.phase + 1)};
}

void complete_bytes(int offset, int bytes, int thread) {
    PhaseBarrier& barrier = hopper().barriers.at(offset);
    barrier.bytes -= bytes;
    if (barrier.bytes <= -kMostBytes) fail(barrier_at(offset) + " cannot count so many bytes", thread);
    advance(*block, barrier);
}

PhaseBarrier& usable_from_afar(Block& of, int offset) {
    auto found = of.hopper->barriers.find(offset);
    std::string whose = ", of block " + std::to_string(of.index) + ",";
    if (of.ended()) fail(barrier_at(offset) + whose + " is used after that block has ended");
    if (found == of.hopper->barriers.end()) fail(barrier_at(offset) + whose + " is used before its init");
    if (!found->second.fenced || found->second.made_in_cluster == of.cluster_epoch) {
        fail(barrier_at(offset) + whose + " is used without " +
             (found->second.fenced ? "a barrier of the cluster in between" : "fence_barriers()"));
    }
    return found->second;
}

void arrive_at(int offset, int rank) {
    hopper();
    if (rank < 0 || rank >= int(cluster.size())) fail("a cluster without a block " + std::to_string(rank));
    Block& of = *cluster[rank];
    PhaseBarrier& barrier = rank == block->rank ? usable(offset) : usable_from_afar(of, offset);
    hopper().actors.release(block->rank, block->running, barrier.gathering);
    count_arrival(of, barrier);
}

void sync_cluster() {
    hopper();
    leave(State::cluster);
}

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
    uint64_t generation = arrive_at_named(id, threads, true);
    const NamedBarrier& barrier = hopper().named[id];
    while (barrier.generation == generation) wait_for(&barrier, Reason{"named barrier", id, threads});
}

void arrive_for(int id, int threads) { arrive_at_named(id, threads, false); }

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
        if (fiber.state == State::cluster) text += " wait for the cluster";
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
