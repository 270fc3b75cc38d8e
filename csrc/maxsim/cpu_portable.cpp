// The inner loops in plain C++, for processors without AVX2 and for other architectures.

#include "cpu_decoding.h"
#include "cpu_smooth_kernels.h"

namespace jmlr::maxsim::cpu {
namespace {

struct Portable {
    static constexpr int lanes = 4;
    struct Floats {
        float lane[lanes];
    };
    struct Integers {
        int32_t lane[lanes];
    };
    struct Mask {
        bool lane[lanes];
    };

    static constexpr int tile_tokens(int) { return 6; }

    template <class Result, class Function>
    static JMLR_INLINE Result each(Function function) {
        Result result;
        for (int i = 0; i < lanes; ++i) result.lane[i] = function(i);
        return result;
    }

    static JMLR_INLINE Floats broadcast_float(float value) {
        return each<Floats>([=](int) { return value; });
    }
    static JMLR_INLINE Floats zero() { return broadcast_float(0); }
    static JMLR_INLINE Floats load_unaligned(const float* at) {
        Floats result;
        std::memcpy(&result, at, sizeof(result));
        return result;
    }
    static JMLR_INLINE Floats load(const float* at) { return load_unaligned(at); }
    static JMLR_INLINE void store_unaligned(float* at, Floats value) { std::memcpy(at, &value, sizeof(value)); }
    static JMLR_INLINE void store(float* at, Floats value) { store_unaligned(at, value); }
    static JMLR_INLINE Floats broadcast(const char* at) {
        float value;
        std::memcpy(&value, at, 4);
        return broadcast_float(value);
    }
    static JMLR_INLINE Floats broadcast_half_unit(const char*) { return zero(); }  // units are floats here

    static JMLR_INLINE Floats add(Floats a, Floats b) {
        return each<Floats>([=](int i) { return a.lane[i] + b.lane[i]; });
    }
    static JMLR_INLINE Floats subtract(Floats a, Floats b) {
        return each<Floats>([=](int i) { return a.lane[i] - b.lane[i]; });
    }
    static JMLR_INLINE float sum(Floats a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
    static JMLR_INLINE Floats multiply(Floats a, Floats b) {
        return each<Floats>([=](int i) { return a.lane[i] * b.lane[i]; });
    }
    static JMLR_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return add(multiply(a, b), c); }
    static JMLR_INLINE Floats maximum_or_second(Floats a, Floats b) {
        return each<Floats>([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static JMLR_INLINE Floats minimum_or_second(Floats a, Floats b) {
        return each<Floats>([=](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static JMLR_INLINE Floats low_bits_as_exponent(Floats a) {
        return each<Floats>([=](int i) { return bits_to_float(float_to_bits(a.lane[i]) << 23); });
    }
    static JMLR_INLINE Mask unordered(Floats a, Floats b) {
        return each<Mask>([=](int i) { return a.lane[i] != a.lane[i] || b.lane[i] != b.lane[i]; });
    }
    static JMLR_INLINE Mask either(Mask a, Mask b) {
        return each<Mask>([=](int i) { return a.lane[i] || b.lane[i]; });
    }
    static JMLR_INLINE Floats nan_where(Mask mask, Floats value) {
        return each<Floats>([=](int i) { return mask.lane[i] ? bits_to_float(0x7fc00000) : value.lane[i]; });
    }
    static JMLR_INLINE Mask greater_or_first_nan(Floats value, Floats best) {
        return each<Mask>([=](int i) { return !(value.lane[i] <= best.lane[i]) && best.lane[i] == best.lane[i]; });
    }
    static JMLR_INLINE Mask equal_where(Mask mask, Floats a, Floats b) {
        return each<Mask>([=](int i) { return mask.lane[i] && a.lane[i] == b.lane[i]; });
    }
    static JMLR_INLINE bool any(Mask mask) {
        bool found = false;
        for (int i = 0; i < lanes; ++i) found |= mask.lane[i];
        return found;
    }
    template <class Lanes>
    static JMLR_INLINE Lanes select(Mask mask, Lanes yes, Lanes no) {
        return each<Lanes>([=](int i) { return mask.lane[i] ? yes.lane[i] : no.lane[i]; });
    }
    static JMLR_INLINE Integers broadcast_integer(int32_t value) {
        return each<Integers>([=](int) { return value; });
    }
    static JMLR_INLINE Integers load_integers(const int32_t* at) {
        return each<Integers>([=](int i) { return at[i]; });
    }
    static JMLR_INLINE void store_integers(int32_t* at, Integers value) { std::memcpy(at, &value, sizeof(value)); }

    static JMLR_INLINE uint16_t two_bytes(const char* at, int i) {
        uint16_t value;
        std::memcpy(&value, at + 2 * i, 2);
        return value;
    }
    static JMLR_INLINE Floats load_halves(const char* at) {
        return each<Floats>([=](int i) { return half_to_float(two_bytes(at, i)); });
    }
    static JMLR_INLINE Floats load_bfloat16(const char* at) {
        return each<Floats>([=](int i) { return bits_to_float(uint32_t{two_bytes(at, i)} << 16); });
    }
    static JMLR_INLINE void store_halves(char* at, Floats value) {
        for (int i = 0; i < lanes; ++i) {
            const uint16_t half = float_to_half(value.lane[i]);
            std::memcpy(at + 2 * i, &half, 2);
        }
    }
    static JMLR_INLINE void store_bfloat16(char* at, Floats value) {
        for (int i = 0; i < lanes; ++i) {
            const uint16_t half = float_to_bfloat16(value.lane[i]);
            std::memcpy(at + 2 * i, &half, 2);
        }
    }

    static JMLR_INLINE Floats load_int8(const char* at) {
        return each<Floats>([=](int i) { return Int8Elements<Portable>::one(at + i); });
    }
    static JMLR_INLINE Floats load_float8(const char* at) {
        return each<Floats>([=](int i) { return Float8Elements<Portable>::one(at + i); });
    }
    template <int bits>
    static JMLR_INLINE Floats field_weights(const char* fields, const float* weights, int64_t d) {
        return each<Floats>([=](int i) { return field_weight<bits>(fields, weights, d + i); });
    }
};

}  // namespace

const Instructions& portable_instructions() {
    static const Instructions set = {"portable",
                                     Portable::lanes,
                                     maxima<Portable, FloatProduct<Portable>>,
                                     nullptr,
                                     weighted_sum<Portable>,
                                     dot<Portable>,
                                     widen<Portable>,
                                     narrow<Portable>,
                                     decode_values<Portable>,
                                     decode_residual<Portable>,
                                     smooth_instructions<Portable>()};
    return set;
}

}  // namespace jmlr::maxsim::cpu
