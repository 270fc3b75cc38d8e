#pragma GCC optimize("O3")  // loops over arrays of many numbers, in vectors

#include "happens_before.h"

#include <algorithm>

#include "emulated_block.h"

namespace emulator {
namespace {

void join(Clock& to, const Clock& from) {
    uint32_t* a = to.data();
    const uint32_t* b = from.data();
    for (size_t i = 0, count = to.size(); i < count; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
}

}  // namespace

Actors::Actors(int blocks, int threads)
    : blocks_(blocks),
      threads_(threads),
      warps_(threads / kWarp),
      groups_((threads + kWarpgroup - 1) / kWarpgroup),
      each_(2 * threads + warps_ + groups_ + kBarriers),
      clocks_(blocks * threads, Clock(blocks * each_)),
      of_warp_(blocks * warps_),
      of_warpgroup_(blocks * groups_) {
    for (int rank = 0; rank < blocks; ++rank) {
        for (int number = 0; number < threads; ++number) clock(rank, number)[thread(rank, number)] = 1;
    }
}

bool Actors::heard(const Clock& clock, Mark mark) const {
    int within = number(mark.who) - 2 * threads_ - warps_;
    if (within < 0 || within >= groups_) return clock[mark.who] >= mark.when;
    uint32_t first = mark.who - uint32_t(within) - uint32_t(warps_) + uint32_t(within) * 4;
    return std::all_of(&clock[first], &clock[first] + kWarpgroup / kWarp,
                       [mark](uint32_t time) { return time >= mark.when; });
}

void Actors::changed(int rank, int thread) {
    of_warp_[rank * warps_ + thread / kWarp].valid = false;
    of_warpgroup_[rank * groups_ + thread / kWarpgroup].valid = false;
}

void Actors::release(int rank, int thread, Clock& to) {
    Clock& own = clock(rank, thread);
    if (to.empty()) to = own;
    else join(to, own);
    ++own[this->thread(rank, thread)];
}

void Actors::acquire(int rank, int thread, const Clock& from) {
    if (from.empty()) return;
    join(clock(rank, thread), from);
    changed(rank, thread);
}

void Actors::exchange(int rank, int first, int threads) {
    Clock all;
    for (int i = first; i < first + threads; ++i) release(rank, i, all);
    for (int i = first; i < first + threads; ++i) acquire(rank, i, all);
}

void Actors::exchange_all() {
    Clock all;
    for (int rank = 0; rank < blocks_; ++rank) {
        for (int i = 0; i < threads_; ++i) release(rank, i, all);
    }
    for (int rank = 0; rank < blocks_; ++rank) {
        for (int i = 0; i < threads_; ++i) acquire(rank, i, all);
    }
}

void Actors::fence_now(int rank, int thread) {
    Clock& own = clock(rank, thread);
    own[fence(rank, thread)] = own[this->thread(rank, thread)]++;
    changed(rank, thread);
}

void Actors::hear(int rank, int thread, Mark mark) {
    uint32_t& time = clock(rank, thread)[mark.who];
    time = std::max(time, mark.when);
    changed(rank, thread);
}

const Clock& Actors::common(int rank, int first, int threads) {
    Common& result =
        threads == kWarp ? of_warp_[rank * warps_ + first / kWarp] : of_warpgroup_[rank * groups_ + first / kWarpgroup];
    if (result.valid) return result.clock;
    result.clock = clock(rank, first);
    uint32_t* a = result.clock.data();
    for (int i = first + 1; i < first + threads; ++i) {
        const uint32_t* b = clock(rank, i).data();
        for (size_t j = 0, count = result.clock.size(); j < count; ++j) a[j] = a[j] < b[j] ? a[j] : b[j];
    }
    result.valid = true;
    return result.clock;
}

void Accesses::race(int cell, const char* what, Mark earlier) const {
    std::string who = actors_.is_thread(earlier.who) ? "thread " + std::to_string(actors_.number(earlier.who))
                                                     : "a product or a copy";
    fail("a race at " + place(cell * 2) + ": " + what + " before, " + who + ", is not ordered with it");
}

void Accesses::check_held(int cell, bool writing) const {
    Held held = cells_[cell].held;
    if (held == kBarrier) fail("an access to " + place(cell * 2) + ", where a barrier lies");
    if (held == kStored && writing) fail("a write to " + place(cell * 2) + " while a store of a box reads it");
}

void Accesses::remember_read(int cell, Mark by, const Clock& heard) {
    Cell& own = cells_[cell];
    if (own.more != 0) {
        many_[own.more - 1][by.who] = by.when;
        return;
    }
    for (Mark& read : own.reads) {
        if (read.when != 0 && read.who != by.who && !actors_.heard(heard, read)) continue;
        read = by;
        return;
    }
    if (unused_.empty()) {
        many_.emplace_back();
        unused_.push_back(int(many_.size()));
    }
    own.more = unused_.back();
    unused_.pop_back();
    Clock& many = many_[own.more - 1];
    many.assign(actors_.count(), 0);
    for (const Mark& read : own.reads) many[read.who] = read.when;
    many[by.who] = by.when;
}

void Accesses::read(int cell, Mark by, const Clock& heard) {
    const Cell& own = cells_[cell];
    check_held(cell, false);
    if (own.write.when != 0 && !actors_.heard(heard, own.write)) race(cell, "one reads; the write", own.write);
    if (own.reads[0].who != by.who || own.reads[0].when != by.when) remember_read(cell, by, heard);
}

void Accesses::read_fenced(int cell, Mark by, const Clock& heard) {
    const Mark write = cells_[cell].write;
    read(cell, by, heard);
    if (write.when == 0 || !actors_.is_thread(write.who)) return;
    if (!actors_.heard(heard, Mark{actors_.fence_of(write.who), write.when})) {
        fail("a product or a store of a box reads " + place(cell * 2) + ", which thread " +
             std::to_string(actors_.number(write.who)) + " wrote without a fence_async() in between");
    }
}

void Accesses::write(int cell, Mark by, const Clock& heard) {
    Cell& own = cells_[cell];
    check_held(cell, true);
    if (own.write.when != 0 && !actors_.heard(heard, own.write)) race(cell, "one writes; the write", own.write);
    if (own.more != 0) {
        const Clock& many = many_[own.more - 1];
        for (uint32_t who = 0; who < many.size(); ++who) {
            Mark read{who, many[who]};
            if (read.when != 0 && !actors_.heard(heard, read)) race(cell, "one writes; the read", read);
        }
        unused_.push_back(own.more);
        own.more = 0;
    }
    for (Mark& read : own.reads) {
        if (read.when != 0 && !actors_.heard(heard, read)) race(cell, "one writes; the read", read);
        read = Mark();
    }
    own.write = by;
}

}  // namespace emulator
