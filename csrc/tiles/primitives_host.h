// primitives.h on an emulated block: every call goes through the emulator's checks.
#pragma once

#include "emulator.h"

namespace tiles {

inline int thread_index() { return emulator::thread_index(); }
inline int lane() { return emulator::thread_index() & (kWarp - 1); }
// A shuffle on the GPU, so all lanes must call it.
inline int warp() {
    emulator::meet(emulator::Meeting::warp, nullptr, [](void**) {});
    return emulator::thread_index() / kWarp;
}
inline int64_t block_index() { return emulator::block_index(); }
inline int64_t block_count() { return emulator::block_count(); }

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::sync_warp(); }

template <class T>
inline T load(const T* pointer) {
    emulator::check_global_read(pointer, sizeof(T));
    return *pointer;
}

template <class T>
inline void store(T* pointer, T value) {
    emulator::check_global_write(pointer, sizeof(T));
    *pointer = value;
}

// A byte offset into the block's shared memory.
template <class T>
class Shared {
public:
    explicit Shared(int offset) : offset_(offset) {}
    Shared operator+(int count) const { return Shared(offset_ + count * int(sizeof(T))); }
    T read(int index = 0) const {
        T value;
        memcpy(&value, emulator::shared_read(offset_ + index * int(sizeof(T)), sizeof(T)), sizeof(T));
        return value;
    }
    void write(int index, T value) const {
        memcpy(emulator::shared_write(offset_ + index * int(sizeof(T)), sizeof(T)), &value, sizeof(T));
    }
    template <class Other>
    Shared<Other> as() const {
        return Shared<Other>(offset_);
    }
    int address() const { return offset_; }

private:
    int offset_;
};

template <class T>
inline Shared<T> shared_memory(int bytes) {
    return Shared<T>(bytes);
}

template <class T>
inline void copy_async(Shared<T> to, const T* from, bool valid) {
    emulator::copy_async(to.address(), from, valid);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroups>
inline void wait_copies() {
    emulator::wait_copies(kGroups);
}

namespace host {

// All lanes meet, the last one computes for all of them.
template <class In, class Out, class Compute>
inline Out together(emulator::Meeting kind, const In& in, Compute compute) {
    Out out;
    struct Slot {
        const In* in;
        Out* out;
    } slot{&in, &out};
    emulator::meet(kind, &slot, [&compute](void** slots) {
        const In* ins[kWarp];
        Out* outs[kWarp];
        for (int l = 0; l < kWarp; ++l) {
            ins[l] = static_cast<Slot*>(slots[l])->in;
            outs[l] = static_cast<Slot*>(slots[l])->out;
        }
        compute(ins, outs);
    });
    return out;
}

struct Registers {
    uint32_t r[4];
};

template <bool kTransposed>
inline void load_matrices(uint32_t (&r)[4], int row) {
    Registers got =
        together<int, Registers>(emulator::Meeting::load_matrices, row, [](const int** rows, Registers** out) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t element[8][8];
                for (int i = 0; i < 8; ++i) {
                    int from = matrix * 8 + i;
                    memcpy(element[i], emulator::shared_read(*rows[from], 16, from, 16), 16);
                }
                for (int l = 0; l < kWarp; ++l) {
                    int i = l / 4, j = l % 4 * 2;
                    uint32_t low = kTransposed ? element[j][i] : element[i][j];
                    uint32_t high = kTransposed ? element[j + 1][i] : element[i][j + 1];
                    out[l]->r[matrix] = low | high << 16;
                }
            }
        });
    for (int i = 0; i < 4; ++i) r[i] = got.r[i];
}

struct Operands {
    float c[4];
    uint32_t a[4];
    uint32_t b[2];
};

struct Products {
    float c[4];
};

// Tensor cores add exact products and cut the sum once (Fasi et al., "Numerical behavior of NVIDIA tensor cores",
// 2021), so errors of long sums do not cancel: the host must not be more exact than that.
inline float toward_zero(double x) {
    float rounded = float(x);
    return std::fabs(double(rounded)) > std::fabs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

// Fragment layouts of the PTX manual, section on mma.m16n8k16 (16 bits) and mma.m16n8k8 (tf32).
template <class Element>
inline void multiply_add(const Operands** in, Products** out) {
    constexpr int kDepth = std::is_same_v<Element, Tf32> ? 8 : 16;
    float a[16][kDepth], b[kDepth][8];
    for (int l = 0; l < kWarp; ++l) {
        int g = l / 4, t = l % 4;
        if constexpr (std::is_same_v<Element, Tf32>) {
            for (int i = 0; i < 4; ++i) {
                a[g + i % 2 * 8][t + i / 2 * 4] = bit_cast<float>(in[l]->a[i] & 0xffffe000u);
            }
            for (int i = 0; i < 2; ++i) b[t + i * 4][g] = bit_cast<float>(in[l]->b[i] & 0xffffe000u);
        } else {
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    uint16_t bits = uint16_t(in[l]->a[i] >> 16 * half);
                    a[g + i % 2 * 8][t * 2 + half + i / 2 * 8] = to_float(Element{bits});
                }
                for (int i = 0; i < 2; ++i) {
                    b[t * 2 + half + i * 8][g] = to_float(Element{uint16_t(in[l]->b[i] >> 16 * half)});
                }
            }
        }
    }
    for (int l = 0; l < kWarp; ++l) {
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; ++i) {
            int row = g + i / 2 * 8, column = t * 2 + i % 2;
            double sum = in[l]->c[i];
            for (int k = 0; k < kDepth; ++k) sum += double(a[row][k]) * b[k][column];
            out[l]->c[i] = toward_zero(sum);
        }
    }
}

}  // namespace host

template <class T>
inline T shuffle_xor(T value, int mask) {
    struct In {
        T value;
        int mask;
    };
    return host::together<In, T>(emulator::Meeting::shuffle, In{value, mask}, [](const In** in, T** out) {
        for (int l = 0; l < kWarp; ++l) *out[l] = in[(l ^ in[l]->mask) & (kWarp - 1)]->value;
    });
}

template <class T>
inline T shuffle(T value, int from) {
    struct In {
        T value;
        int from;
    };
    return host::together<In, T>(emulator::Meeting::shuffle, In{value, from}, [](const In** in, T** out) {
        for (int l = 0; l < kWarp; ++l) *out[l] = in[in[l]->from & (kWarp - 1)]->value;
    });
}

inline uint32_t ballot(bool bit) {
    return host::together<bool, uint32_t>(emulator::Meeting::ballot, bit, [](const bool** in, uint32_t** out) {
        uint32_t bits = 0;
        for (int l = 0; l < kWarp; ++l) bits |= uint32_t(*in[l]) << l;
        for (int l = 0; l < kWarp; ++l) *out[l] = bits;
    });
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(int(bits)) - 1; }

template <class T>
inline void load_matrices(uint32_t (&r)[4], Shared<T> row) {
    host::load_matrices<false>(r, row.address());
}

template <class T>
inline void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
    host::load_matrices<true>(r, row.address());
}

template <class Element>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::Operands in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    auto got = host::together<host::Operands, host::Products>(emulator::Meeting::multiply_add, in,
                                                              host::multiply_add<Element>);
    for (int i = 0; i < 4; ++i) c[i] = got.c[i];
}

}  // namespace tiles
