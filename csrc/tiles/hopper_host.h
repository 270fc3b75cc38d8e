// hopper.h on an emulated block: every call goes through the emulator's checks.
#pragma once

#include "hopper_emulator.h"

namespace tiles {

using emulator::TensorMap;

inline uint32_t shared_address(int offset) { return emulator::shared_address(offset); }
inline void prefetch_map(const TensorMap&) {}

class Barrier {
public:
    explicit Barrier(int offset) : offset_(offset) {}
    void init(int arrivals) const { emulator::init_barrier(offset_, arrivals); }
    void arrive() const { emulator::arrive(offset_, 0); }
    void arrive_expecting(int bytes) const { emulator::arrive(offset_, bytes); }
    void arrive_at(int block) const { emulator::arrive_at(offset_, block); }
    void wait(int parity) const { emulator::wait_barrier(offset_, parity); }
    uint32_t address() const { return emulator::shared_address(offset_); }
    int offset() const { return offset_; }

private:
    int offset_;
};

inline void fence_barriers() { emulator::fence_barriers(); }

namespace host {

template <class... Int>
inline emulator::Coordinates coordinates(Int... c) {
    static_assert(sizeof...(c) >= 2 && sizeof...(c) <= 4);
    return {int(sizeof...(c)), {int(c)...}};
}

TensorMap tensor_map(const void* data, int element_bytes, int count, const int64_t* sizes, const uint64_t* stride_bytes,
                     const int* box);

inline emulator::Number number(Half) { return emulator::Number::half; }
inline emulator::Number number(BFloat16) { return emulator::Number::bfloat16; }
inline emulator::Number number(Float8) { return emulator::Number::float8; }

template <class... Accumulators>
struct Named {
    emulator::Accumulator list[sizeof...(Accumulators) + 1];
    explicit Named(Accumulators&... c) : list{{&c[0][0], int(sizeof(c) / sizeof(float))}..., {}} {}
};

}  // namespace host

template <class... Int>
inline void copy_box(int offset, const TensorMap& map, const Barrier& barrier, Int... c) {
    emulator::copy_box(0, offset, map, barrier.offset(), host::coordinates(c...));
}
template <class... Int>
inline void copy_box_to_all(uint16_t blocks, int offset, const TensorMap& map, const Barrier& barrier, Int... c) {
    emulator::copy_box(blocks, offset, map, barrier.offset(), host::coordinates(c...));
}
template <class... Int>
inline void store_box(const TensorMap& map, int offset, Int... c) {
    emulator::store_box(map, offset, host::coordinates(c...));
}
inline void commit_stores() { emulator::commit_stores(); }
template <int kGroups>
inline void wait_stores() {
    emulator::wait_stores(kGroups);
}
template <int kGroups>
inline void wait_stores_written() {
    emulator::wait_stores(kGroups);
}
inline void copy_bytes(int offset, const void* from, int bytes, const Barrier& barrier) {
    emulator::copy_bytes(offset, from, bytes, barrier.offset());
}

inline void fence_async() { emulator::fence_async(); }

template <class... Accumulators>
inline void open_products(Accumulators&... c) {
    emulator::open_products(host::Named<Accumulators...>(c...).list, int(sizeof...(c)));
}

template <class Element, Major kA, Major kB, int kColumns>
inline void multiply_async(float (&c)[kColumns][4], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(sizeof(Element) == 2 || (kA == Major::inner && kB == Major::inner));
    emulator::multiply_async({host::number(Element{}), kColumns * 8, kA == Major::outer, kB == Major::outer, accumulate,
                              nullptr, a, b, &c[0][0]});
}
template <class Element, Major kB, int kColumns>
inline void multiply_async(float (&c)[kColumns][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(sizeof(Element) == 2 || kB == Major::inner);
    emulator::multiply_async(
        {host::number(Element{}), kColumns * 8, false, kB == Major::outer, accumulate, a, 0, b, &c[0][0]});
}

inline void close_products() { emulator::close_products(); }

template <int kGroups, class... Accumulators>
inline void wait_products(Accumulators&... c) {
    emulator::wait_products(kGroups, host::Named<Accumulators...>(c...).list, int(sizeof...(c)));
}

template <int kRegisters>
inline void take_registers() {
    static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 240);
    emulator::set_registers(kRegisters, true);
}
template <int kRegisters>
inline void give_registers() {
    static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 240);
    emulator::set_registers(kRegisters, false);
}

inline void sync_threads_of(int id, int threads) { emulator::sync_threads_of(id, threads); }
inline void arrive_for(int id, int threads) { emulator::arrive_for(id, threads); }

inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_size() { return emulator::cluster_size(); }
inline void sync_cluster() { emulator::sync_cluster(); }

}  // namespace tiles
