// hopper.h on a GPU of compute capability 9.0.
#pragma once

#include <cuda.h>

#include "wgmma_registers.h"

namespace tiles {

struct TensorMap {
    CUtensorMap map;
};

JMLR_DEVICE uint32_t shared_address(int offset) { return shared_memory<unsigned char>(offset).address(); }

JMLR_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map.map) : "memory");
}

class Barrier {
public:
    JMLR_DEVICE explicit Barrier(int offset) : address_(shared_address(offset)) {}

    JMLR_DEVICE void init(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_), "r"(arrivals) : "memory");
    }
    JMLR_DEVICE void arrive() const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_) : "memory");
    }
    JMLR_DEVICE void arrive_expecting(int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes) : "memory");
    }
    // Releases as far as the own block goes: ".release.cluster" would put a fence of the whole GPU before it, and what
    // is told in this way is that products have read their tiles, which a wait has made sure of.
    JMLR_DEVICE void arrive_at(int block) const {
        asm volatile(
            "{\n"
            ".reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
            "}" ::"r"(address_),
            "r"(block)
            : "memory");
    }
    JMLR_DEVICE void wait(int parity) const {
        uint32_t done = 0;
        while (!done) {
            asm volatile(
                "{\n"
                ".reg .pred done;\n"
                "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                "selp.u32 %0, 1, 0, done;\n"
                "}"
                : "=r"(done)
                : "r"(address_), "r"(parity)
                : "memory");
        }
    }
    JMLR_DEVICE uint32_t address() const { return address_; }

private:
    uint32_t address_;
};

JMLR_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

#define JMLR_COPY_BOX "cp.async.bulk.tensor."
#define JMLR_COPY_FROM ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"

JMLR_DEVICE void copy_box(int offset, const TensorMap& map, const Barrier& barrier, int c0, int c1) {
    asm volatile(JMLR_COPY_BOX "2d" JMLR_COPY_FROM " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1)
                 : "memory");
}
JMLR_DEVICE void copy_box(int offset, const TensorMap& map, const Barrier& barrier, int c0, int c1, int c2) {
    asm volatile(JMLR_COPY_BOX "3d" JMLR_COPY_FROM " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
JMLR_DEVICE void copy_box(int offset, const TensorMap& map, const Barrier& barrier, int c0, int c1, int c2, int c3) {
    asm volatile(JMLR_COPY_BOX "4d" JMLR_COPY_FROM " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

JMLR_DEVICE void copy_box_to_all(uint16_t blocks, int offset, const TensorMap& map, const Barrier& barrier, int c0,
                                 int c1) {
    asm volatile(JMLR_COPY_BOX "2d" JMLR_COPY_FROM
                               ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "h"(blocks)
                 : "memory");
}
JMLR_DEVICE void copy_box_to_all(uint16_t blocks, int offset, const TensorMap& map, const Barrier& barrier, int c0,
                                 int c1, int c2) {
    asm volatile(JMLR_COPY_BOX "3d" JMLR_COPY_FROM
                               ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
                 : "memory");
}
JMLR_DEVICE void copy_box_to_all(uint16_t blocks, int offset, const TensorMap& map, const Barrier& barrier, int c0,
                                 int c1, int c2, int c3) {
    asm volatile(JMLR_COPY_BOX
                 "4d" JMLR_COPY_FROM
                 ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(offset)),
                 "l"(&map.map), "r"(barrier.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
                 : "memory");
}

JMLR_DEVICE void store_box(const TensorMap& map, int offset, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map.map),
                 "r"(shared_address(offset)), "r"(c0), "r"(c1)
                 : "memory");
}
JMLR_DEVICE void store_box(const TensorMap& map, int offset, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map.map),
                 "r"(shared_address(offset)), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
JMLR_DEVICE void store_box(const TensorMap& map, int offset, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map.map),
        "r"(shared_address(offset)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
JMLR_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kGroups>
JMLR_DEVICE void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
template <int kGroups>
JMLR_DEVICE void wait_stores_written() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

JMLR_DEVICE void copy_bytes(int offset, const void* from, int bytes, const Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(offset)),
                 "l"(from), "r"(bytes), "r"(barrier.address())
                 : "memory");
}

JMLR_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

namespace wgmma {

// Keeps the compiler from moving what it does with an accumulator across this place.
template <int kColumns>
JMLR_DEVICE void pin(float (&c)[kColumns][4]) {
    JMLR_UNROLL
    for (int i = 0; i < kColumns * 4; ++i) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}

template <class Element, int kN>
struct Instruction;

#define JMLR_WGMMA(N, ELEMENT, DEPTH, TYPE)                                                                            \
    template <>                                                                                                        \
    struct Instruction<ELEMENT, N> {                                                                                   \
        template <int kOuterA, int kOuterB>                                                                            \
        static JMLR_DEVICE void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {                 \
            asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " JMLR_WGMMA_2_##N                                    \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N DEPTH ".f32." TYPE "." TYPE " " JMLR_WGMMA_C_##N \
                         ", " JMLR_WGMMA_0_##N ", " JMLR_WGMMA_1_##N ", more, 1, 1, " JMLR_WGMMA_3_##N                 \
                         ", " JMLR_WGMMA_4_##N ";\n}"                                                                  \
                         : JMLR_WGMMA_OUT_##N(c)                                                                       \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(kOuterA), "n"(kOuterB));                               \
        }                                                                                                              \
        template <int kOuterB>                                                                                         \
        static JMLR_DEVICE void registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {  \
            asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " JMLR_WGMMA_5_##N                                    \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N DEPTH ".f32." TYPE "." TYPE " " JMLR_WGMMA_C_##N \
                         ", {" JMLR_WGMMA_0_##N ", " JMLR_WGMMA_1_##N ", " JMLR_WGMMA_2_##N ", " JMLR_WGMMA_3_##N      \
                         "}, " JMLR_WGMMA_4_##N ", more, 1, 1, " JMLR_WGMMA_6_##N ";\n}"                               \
                         : JMLR_WGMMA_OUT_##N(c)                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kOuterB));         \
        }                                                                                                              \
    };

// Numbers of one byte have no transposed operands.
#define JMLR_WGMMA_FLOAT8(N)                                                                                          \
    template <>                                                                                                       \
    struct Instruction<Float8, N> {                                                                                   \
        template <int kOuterA, int kOuterB>                                                                           \
        static JMLR_DEVICE void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {                \
            static_assert(!kOuterA && !kOuterB);                                                                      \
            asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " JMLR_WGMMA_2_##N                                   \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 " JMLR_WGMMA_C_##N           \
                         ", " JMLR_WGMMA_0_##N ", " JMLR_WGMMA_1_##N ", more, 1, 1;\n}"                               \
                         : JMLR_WGMMA_OUT_##N(c)                                                                      \
                         : "l"(a), "l"(b), "r"(accumulate));                                                          \
        }                                                                                                             \
        template <int kOuterB>                                                                                        \
        static JMLR_DEVICE void registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
            static_assert(!kOuterB);                                                                                  \
            asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " JMLR_WGMMA_5_##N                                   \
                         ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 " JMLR_WGMMA_C_##N           \
                         ", {" JMLR_WGMMA_0_##N ", " JMLR_WGMMA_1_##N ", " JMLR_WGMMA_2_##N ", " JMLR_WGMMA_3_##N     \
                         "}, " JMLR_WGMMA_4_##N ", more, 1, 1;\n}"                                                    \
                         : JMLR_WGMMA_OUT_##N(c)                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                      \
        }                                                                                                             \
    };

#define JMLR_WGMMA_ALL(N)                  \
    JMLR_WGMMA(N, Half, "k16", "f16")      \
    JMLR_WGMMA(N, BFloat16, "k16", "bf16") \
    JMLR_WGMMA_FLOAT8(N)

JMLR_WGMMA_ALL(8)
JMLR_WGMMA_ALL(16)
JMLR_WGMMA_ALL(32)
JMLR_WGMMA_ALL(48)
JMLR_WGMMA_ALL(64)
JMLR_WGMMA_ALL(80)
JMLR_WGMMA_ALL(96)
JMLR_WGMMA_ALL(112)
JMLR_WGMMA_ALL(128)
JMLR_WGMMA_ALL(160)
JMLR_WGMMA_ALL(176)
JMLR_WGMMA_ALL(192)
JMLR_WGMMA_ALL(224)
JMLR_WGMMA_ALL(256)

#undef JMLR_WGMMA_ALL
#undef JMLR_WGMMA_FLOAT8
#undef JMLR_WGMMA

}  // namespace wgmma

template <class... Accumulators>
JMLR_DEVICE void open_products(Accumulators&... c) {
    (wgmma::pin(c), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <class Element, Major kA, Major kB, int kColumns>
JMLR_DEVICE void multiply_async(float (&c)[kColumns][4], uint64_t a, uint64_t b, bool accumulate) {
    wgmma::Instruction<Element, kColumns * 8>::template shared<kA == Major::outer, kB == Major::outer>(c, a, b,
                                                                                                       accumulate);
}

template <class Element, Major kB, int kColumns>
JMLR_DEVICE void multiply_async(float (&c)[kColumns][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    wgmma::Instruction<Element, kColumns * 8>::template registers<kB == Major::outer>(c, a, b, accumulate);
}

JMLR_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kGroups, class... Accumulators>
JMLR_DEVICE void wait_products(Accumulators&... c) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
    (wgmma::pin(c), ...);
}

template <int kRegisters>
JMLR_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
JMLR_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

JMLR_DEVICE void sync_threads_of(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
JMLR_DEVICE void arrive_for(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

JMLR_DEVICE int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
JMLR_DEVICE int cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return int(size);
}
JMLR_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace tiles
