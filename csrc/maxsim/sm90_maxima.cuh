// The maxima of a warpgroup's accumulators: what follows each product, while the next ones run.
#pragma once

#include "row_maxima.cuh"

namespace jmlr::maxsim::sm90 {

// Similarities of excluded tokens become -inf; bit i % 32 of kept[i / 32] stands for column i.
template <int kColumnTiles>
JMLR_DEVICE void exclude(float (&s)[kColumnTiles][4], const uint32_t (&kept)[4]) {
    JMLR_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
        uint32_t bits = kept[n / 4] >> tiles::accumulator_column(0);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) {
            if ((bits >> (n % 4 * 8 + i % 2) & 1) == 0) s[n][i] = -tiles::kInfinity;
        }
    }
}

// One row's similarities in a lane: half 0 or 1 of accumulators.
template <int kColumnTiles>
struct RowPart {
    static constexpr int kCount = kColumnTiles * 2;

    const float (&s)[kColumnTiles][4];
    int half;

    JMLR_DEVICE float at(int i) const { return s[i / 2][2 * half + i % 2]; }

    // Two chains, so that one need not wait for each maximum of the other.
    JMLR_DEVICE float highest() const {
        float even = at(0), odd = at(1);
        JMLR_UNROLL
        for (int i = 2; i < kCount; i += 2) {
            even = tiles::maximum_or_nan(even, at(i));
            odd = tiles::maximum_or_nan(odd, at(i + 1));
        }
        return tiles::maximum_or_nan(even, odd);
    }

    // The lowest i with at(i) == highest, by comparisons.
    JMLR_DEVICE int find(float highest) const {
        int found = 0;
        JMLR_UNROLL
        for (int i = kCount - 1; i >= 0; --i) {
            bool equal = highest != highest ? at(i) != at(i) : at(i) == highest;
            if (equal) found = i;
        }
        return found;
    }

    // The same by fused multiply-adds, which have twice the lanes of comparisons and are idle otherwise. With a power
    // of two `scale` so that highest * scale lies in [2**24, 2**25), (highest - at(i)) * scale is zero for equals and
    // at least 1 for all others, for no number between differs from `highest` by less; so, cut to [0, 1], it is a bit,
    // and sums of bits times powers of two are exact. Not for NaN, infinities and numbers below 2**-103.
    JMLR_DEVICE int find_by_sums(float highest) const {
        constexpr int kBits = 16, kSums = tiles::ceil_div(kCount, kBits);
        float scale = tiles::bit_cast<float>((278u - exponent(highest)) << 23), offset = highest * scale;
        uint32_t others = 0;
        JMLR_UNROLL
        for (int sum = 0; sum < kSums; ++sum) {
            float bits = 0.0f;
            JMLR_UNROLL
            for (int i = 0; i < kBits && sum * kBits + i < kCount; ++i) {
                bits += tiles::multiply_add_cut(at(sum * kBits + i), -scale, offset) * float(1 << i);
            }
            others |= uint32_t(int(bits)) << (sum * kBits);
        }
        return tiles::lowest_bit(~others);
    }

    static JMLR_DEVICE uint32_t exponent(float x) { return tiles::bit_cast<uint32_t>(x) >> 23 & 255; }
    static JMLR_DEVICE bool has_sums(float x) { return exponent(x) - 24 <= 254 - 24; }
};

// The lane's maximum of each row after one more tile, whose column 0 is token `first`; with `track` its position too,
// which stays where no similarity is above -inf. `whole`: every token is kept.
template <bool kBySums, int kColumnTiles>
JMLR_DEVICE void absorb_tile(float (&s)[kColumnTiles][4], Maximum (&maxima)[2], const uint32_t (&kept)[4], bool whole,
                             int first, bool track) {
    if (!whole) exclude(s, kept);
    JMLR_UNROLL
    for (int half = 0; half < 2; ++half) {
        RowPart<kColumnTiles> row{s, half};
        Maximum& best = maxima[half];
        float highest = row.highest();
        if (track) {
            bool better = best.value == best.value && !(highest <= best.value);
            int found = kBySums ? row.find_by_sums(highest) : row.find(highest);
            if (kBySums && better && !row.has_sums(highest)) found = row.find(highest);
            if (better) best.position = first + found / 2 * 8 + found % 2 + tiles::accumulator_column(0);
        }
        best.value = tiles::maximum_or_nan(best.value, highest);
    }
}

}  // namespace jmlr::maxsim::sm90
