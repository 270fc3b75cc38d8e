// primitives.h on a GPU of compute capability 8.0 or later.
#pragma once

namespace tiles {

JMLR_DEVICE int thread_index() { return int(threadIdx.x); }
JMLR_DEVICE int lane() { return int(threadIdx.x) & (kWarp - 1); }
// Uniform within a warp, which the compiler cannot see by itself.
JMLR_DEVICE int warp() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0); }
JMLR_DEVICE int64_t block_index() { return blockIdx.x; }
JMLR_DEVICE int64_t block_count() { return gridDim.x; }

JMLR_DEVICE void sync_block() { __syncthreads(); }
JMLR_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
JMLR_DEVICE T load(const T* pointer) {
    return *pointer;
}

template <class T>
JMLR_DEVICE void store(T* pointer, T value) {
    *pointer = value;
}

template <class T>
class Shared {
public:
    JMLR_DEVICE explicit Shared(T* pointer) : pointer_(pointer) {}
    JMLR_DEVICE Shared operator+(int count) const { return Shared(pointer_ + count); }
    JMLR_DEVICE T read(int index = 0) const { return pointer_[index]; }
    JMLR_DEVICE void write(int index, T value) const { pointer_[index] = value; }
    template <class Other>
    JMLR_DEVICE Shared<Other> as() const {
        return Shared<Other>(reinterpret_cast<Other*>(pointer_));
    }
    JMLR_DEVICE uint32_t address() const { return uint32_t(__cvta_generic_to_shared(pointer_)); }

private:
    T* pointer_;
};

template <class T>
JMLR_DEVICE Shared<T> shared_memory(int bytes) {
    extern __shared__ __align__(1024) unsigned char jmlr_shared_memory[];
    return Shared<T>(reinterpret_cast<T*>(jmlr_shared_memory + bytes));
}

template <class T>
JMLR_DEVICE void copy_async(Shared<T> to, const T* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(bytes) : "memory");
}

JMLR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
JMLR_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

template <class T>
JMLR_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
JMLR_DEVICE T shuffle(T value, int from) {
    return __shfl_sync(0xffffffffu, value, from);
}

JMLR_DEVICE uint32_t ballot(bool bit) { return __ballot_sync(0xffffffffu, bit); }

JMLR_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
JMLR_DEVICE int lowest_bit(uint32_t bits) { return __ffs(int(bits)) - 1; }

template <class T>
JMLR_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
}

template <class T>
JMLR_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
}

template <class Element>
JMLR_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
JMLR_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
JMLR_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
JMLR_DEVICE void multiply_add<Tf32>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tiles
