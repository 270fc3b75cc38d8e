// Shared memory, its copies of 16 bytes, and global memory: who may touch what.
#include <algorithm>
#include <cstring>
#include <utility>

#include "hopper_block.h"

namespace emulator {
namespace {

constexpr int kSeveralWarps = -2;

struct Owner {
    int64_t block = -1;
    int thread = kNobody;
    uint32_t launch = 0;
    uint32_t epoch = 0;
};

struct Range {
    const char* begin;
    const char* end;
    bool writable;
    std::string name;
    std::vector<Owner> owners;
};

std::vector<Range> ranges;
uint32_t launches = 0;

// Whether `earlier` and an access now by `thread` may happen in either order.
bool unordered(const Access& earlier, int thread, uint32_t warp_epoch) {
    if (earlier.thread == kNobody || earlier.epoch != block->epoch) return false;
    if (earlier.thread == kSeveralWarps) return true;
    if (earlier.thread == thread && !earlier.several_lanes) return false;
    return earlier.thread / kWarp != thread / kWarp || earlier.warp_epoch == warp_epoch;
}

// Of the same block.
bool unordered(const Owner& earlier) {
    if (!block->hopper) return earlier.epoch == block->epoch;
    const Actors& actors = block->hopper->actors;
    return !actors.heard(heard(), Mark{actors.thread(block->rank, earlier.thread), earlier.epoch});
}

Range& range_of(const void* pointer, size_t bytes, bool write) {
    const char* at = static_cast<const char*>(pointer);
    for (Range& range : ranges) {
        if (at >= range.begin && at + bytes <= range.end) {
            if (write && !range.writable) fail("a write to the input " + range.name);
            return range;
        }
    }
    std::string nearest = "no tensor";
    int64_t distance = INT64_MAX;
    for (const Range& range : ranges) {
        int64_t beyond = std::max<int64_t>(range.begin - at, at + int64_t(bytes) - range.end);
        if (beyond < distance) {
            distance = beyond;
            nearest = range.name + " by " + std::to_string(beyond) + " bytes";
        }
    }
    fail(std::string(write ? "a write" : "a read") + " outside of every tensor, nearest: past " + nearest);
}

}  // namespace

std::string place(int offset) { return "byte " + std::to_string(offset) + " of shared memory"; }

void check_arrived(int cell, int thread) {
    const Cell& own = block->cells[cell];
    if (own.copying != kNobody)
        fail("a read of " + place(cell * 2) + " while an asynchronous copy to it is under way", thread);
    if (own.write.thread == kNobody) fail("a read of " + place(cell * 2) + ", which nobody has written", thread);
}

void check_shared_place(int offset, int bytes, int alignment, int thread) {
    if (offset < 0 || offset + bytes > int(block->shared.size())) {
        fail("access outside shared memory: " + place(offset) + ", which has " + std::to_string(block->shared.size()),
             thread);
    }
    if (bytes % 2 != 0 || offset % (alignment ? alignment : bytes) != 0)
        fail("misaligned access to " + place(offset), thread);
}

const void* shared_read(int offset, int bytes, int by_lane, int alignment) {
    int thread = by_lane < 0 ? block->running : block->running / kWarp * kWarp + by_lane;
    check_shared_place(offset, bytes, alignment, thread);
    uint32_t warp_epoch = block->warps[thread / kWarp].epoch;
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
        check_arrived(i, thread);
        if (block->hopper) {
            Actors& actors = block->hopper->actors;
            block->hopper->accesses.read(i, actors.now(block->rank, thread), actors.clock(block->rank, thread));
            continue;
        }
        Cell& cell = block->cells[i];
        if (unordered(cell.write, thread, warp_epoch)) {
            fail("a race at " + place(i * 2) + ": thread " + std::to_string(cell.write.thread) +
                     " writes, another reads",
                 thread);
        }
        Access& read = cell.read;
        if (read.thread == kNobody || read.epoch != block->epoch) {
            read = Access{thread, false, block->epoch, warp_epoch};
        } else if (read.thread != kSeveralWarps && read.thread / kWarp != thread / kWarp) {
            read.thread = kSeveralWarps;
        } else if (read.thread != kSeveralWarps && read.thread != thread) {
            read = Access{thread, true, block->epoch, warp_epoch};
        } else {
            read.warp_epoch = warp_epoch;
        }
    }
    return block->shared.data() + offset;
}

void* shared_write(int offset, int bytes) {
    int thread = block->running;
    check_shared_place(offset, bytes, 0, thread);
    uint32_t warp_epoch = block->warps[thread / kWarp].epoch;
    for (int i = offset / 2; i < (offset + bytes) / 2; ++i) {
        Cell& cell = block->cells[i];
        if (cell.copying != kNobody)
            fail("a write to " + place(i * 2) + " while an asynchronous copy to it is under way");
        if (block->hopper) {
            block->hopper->accesses.write(i, now(), heard());
            cell.write.thread = thread;
            continue;
        }
        if (unordered(cell.write, thread, warp_epoch)) fail("a race at " + place(i * 2) + ": two threads write");
        if (unordered(cell.read, thread, warp_epoch)) {
            fail("a race at " + place(i * 2) + ": a thread reads, another writes");
        }
        cell.write = Access{thread, false, block->epoch, warp_epoch};
    }
    return block->shared.data() + offset;
}

void copy_async(int offset, const void* from, bool valid) {
    if (valid) check_global_read(from, 16);
    shared_write(offset, 16);
    for (int i = offset / 2; i < (offset + 16) / 2; ++i) block->cells[i].copying = block->running;
    // What was there is gone, what comes is not there yet.
    std::memset(block->shared.data() + offset, 0xff, 16);
    block->fibers[block->running].open.push_back(AsyncCopy{offset, from, valid});
}

void commit_copies() {
    Fiber& fiber = block->fibers[block->running];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void wait_copies(int groups_under_way) {
    Fiber& fiber = block->fibers[block->running];
    while (int(fiber.groups.size()) > groups_under_way) {
        for (const AsyncCopy& copy : fiber.groups.front()) {
            for (int i = copy.offset / 2; i < (copy.offset + 16) / 2; ++i) block->cells[i].copying = kNobody;
            void* to = shared_write(copy.offset, 16);
            if (copy.valid) {
                std::memcpy(to, copy.from, 16);
            } else {
                std::memset(to, 0, 16);
            }
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

void check_global_read(const void* pointer, size_t bytes, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(pointer) % (alignment ? alignment : bytes) != 0)
        fail("a misaligned read of " + std::to_string(bytes) + " bytes");
    Range& range = range_of(pointer, bytes, false);
    if (!range.writable) return;
    size_t first = static_cast<const char*>(pointer) - range.begin;
    for (size_t i = first; i < first + bytes; ++i) {
        const Owner& owner = range.owners[i];
        if (owner.launch == 0) fail("a read of " + range.name + " where nobody has written");
        if (owner.launch != launches || (owner.block == block->index && owner.thread == block->running)) continue;
        if (owner.block != block->index) fail("a race at " + range.name + ": another block writes what this one reads");
        if (unordered(owner)) fail("a race at " + range.name + ": another thread writes what this one reads");
    }
}

void check_global_write(const void* pointer, size_t bytes, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(pointer) % (alignment ? alignment : bytes) != 0)
        fail("a misaligned write of " + std::to_string(bytes) + " bytes");
    Range& range = range_of(pointer, bytes, true);
    size_t first = static_cast<const char*>(pointer) - range.begin;
    for (size_t i = first; i < first + bytes; ++i) {
        Owner& owner = range.owners[i];
        if (owner.launch == launches && !(owner.block == block->index && owner.thread == block->running)) {
            if (owner.block != block->index) fail("a race at " + range.name + ": two blocks write the same element");
            if (unordered(owner)) fail("a race at " + range.name + ": two threads write the same element");
        }
        owner = Owner{block->index, block->running, launches, block->hopper ? now().when : block->epoch};
    }
}

void begin_launch() { ++launches; }

void register_tensor(const void* data, size_t bytes, bool writable, const std::string& name) {
    const char* begin = static_cast<const char*>(data);
    ranges.push_back(Range{begin, begin + bytes, writable, name, std::vector<Owner>(writable ? bytes : 0)});
}

void forget_tensors() { ranges.clear(); }

}  // namespace emulator
