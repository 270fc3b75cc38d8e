// Which accesses to shared memory may meet, for blocks whose threads wait for each other in more ways than
// sync_block(): vector clocks. Everything that touches memory is an actor with a time of its own, which passes whenever
// the actor tells others what it did; an actor's clock holds the latest time of every actor that it has heard of, at
// first or second hand. An access is ordered after another if its actor has heard of the other's time.
//
// Actors are the threads; the products of a warp, whose time is the number of their group, and of a warpgroup, which
// all four of its warps must have waited for; the copies that a barrier counts, whose time is the number of its phase;
// and, for every thread, what it had written when it last fenced (fence_async).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

using Clock = std::vector<uint32_t>;

// `when` 0: never.
struct Mark {
    uint32_t who = 0, when = 0;
};

class Actors {
public:
    static constexpr int kBarriers = 64;  // of a block

    Actors(int blocks, int threads);
    uint32_t thread(int rank, int number) const { return uint32_t(rank * each_ + number); }
    uint32_t fence(int rank, int number) const { return thread(rank, threads_ + number); }
    uint32_t warp(int rank, int number) const { return thread(rank, 2 * threads_ + number); }
    uint32_t warpgroup(int rank, int number) const { return thread(rank, 2 * threads_ + warps_ + number); }
    uint32_t barrier(int rank, int number) const { return thread(rank, 2 * threads_ + warps_ + groups_ + number); }

    int count() const { return each_ * blocks_; }
    bool is_thread(uint32_t who) const { return int(who) % each_ < threads_; }
    uint32_t fence_of(uint32_t thread) const { return thread + uint32_t(threads_); }
    int number(uint32_t who) const { return int(who) % each_; }

    // Whether who has this clock has heard of it.
    bool heard(const Clock& clock, Mark mark) const;

    Clock& clock(int rank, int thread) { return clocks_[rank * threads_ + thread]; }
    Mark now(int rank, int thread) const {
        uint32_t who = this->thread(rank, thread);
        return {who, clocks_[rank * threads_ + thread][who]};
    }

    // What a thread tells, and hears.
    void release(int rank, int thread, Clock& to);
    void acquire(int rank, int thread, const Clock& from);
    // Neighbours tell each other everything.
    void exchange(int rank, int first, int threads);
    void exchange_all();
    void fence_now(int rank, int thread);
    void hear(int rank, int thread, Mark mark);

    // What all of a warp's lanes, or a warpgroup's, have heard.
    const Clock& common(int rank, int first, int threads);

private:
    void changed(int rank, int thread);

    struct Common {
        bool valid = false;
        Clock clock;
    };

    int blocks_, threads_, warps_, groups_, each_;
    std::vector<Clock> clocks_;
    std::vector<Common> of_warp_, of_warpgroup_;
};

// The accesses to one block's shared memory, two bytes at a time. Each of the functions throws where one that it must
// not meet is not ordered before it.
class Accesses {
public:
    enum Held : uint8_t { kFree, kStored, kBarrier };

    Accesses(const Actors& actors, size_t cells) : actors_(actors), cells_(cells) {}

    void read(int cell, Mark by, const Clock& heard);
    // By products and stores of boxes, which see what threads wrote through a fence alone.
    void read_fenced(int cell, Mark by, const Clock& heard);
    void write(int cell, Mark by, const Clock& heard);
    // Written, without a check.
    void arrived(int cell, Mark by) { cells_[cell].write = by; }
    void hold(int cell, Held held) { cells_[cell].held = held; }
    void remember_read(int cell, Mark by, const Clock& heard);

private:
    struct Cell {
        Mark write;
        Mark reads[2];
        int more = 0;  // number, from 1 on, of a clock of readers when there are many
        Held held = kFree;
    };

    [[noreturn]] void race(int cell, const char* what, Mark earlier) const;
    void check_held(int cell, bool writing) const;

    const Actors& actors_;
    std::vector<Cell> cells_;
    std::vector<Clock> many_;
    std::vector<int> unused_;
};

}  // namespace emulator
