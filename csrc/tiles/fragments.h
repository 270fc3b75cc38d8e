// Pieces of matrices in the registers of a warp, as the tensor cores take them, and their products.
//
// A product is c[16, 8] += a[16, K] b[K, 8] with K = Fragments<Element>::kDepth. float is multiplied in three products
// of 19-bit numbers ("3xTF32"): high * high + high * low + low * high, which loses about two bits of a float product.
//
// Accumulator: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one:
//   c[0], c[1] in the first row, c[2], c[3] in the second.
#pragma once

#include "shared_tile.h"

namespace tiles {

JMLR_DEVICE int accumulator_row(int i) { return lane() / 4 + i / 2 * 8; }
JMLR_DEVICE int accumulator_column(int i) { return lane() % 4 * 2 + i % 2; }

// Reductions over the four lanes that share the rows of an accumulator.
JMLR_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

JMLR_DEVICE float row_maximum(float x) {
    x = larger(x, shuffle_xor(x, 1));
    return larger(x, shuffle_xor(x, 2));
}

template <class Element>
struct Fragments {
    static constexpr int kDepth = 16;

    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[2];
    };
    struct BPair {  // two neighbours, columns n .. n + 15
        B b[2];
    };

    // a[row + down, k] from a tile that holds [row, k]; `down` is known to the compiler.
    template <class Tile>
    static JMLR_DEVICE A load_a(const Tile& tile, int row, int down, int k) {
        A a;
        load_matrices(a.r, tile.at(row + lane() % 16, down, lane() / 16 * 8, k));
        return a;
    }
    template <class Tile>
    static JMLR_DEVICE A load_a(const Tile& tile, int row, int k) {
        return load_a(tile, row, 0, k);
    }

    // a[row, k] from a tile that holds [k, row].
    template <class Tile>
    static JMLR_DEVICE A load_a_transposed(const Tile& tile, int row, int k) {
        A a;
        load_matrices_transposed(a.r, tile.at(lane() % 8 + lane() / 16 * 8, k, lane() / 8 % 2 * 8, row));
        return a;
    }

    // b[k, n] from a tile that holds [n, k].
    template <class Tile>
    static JMLR_DEVICE BPair load_b(const Tile& tile, int n, int k) {
        uint32_t r[4];
        load_matrices(r, tile.at(lane() % 8 + lane() / 16 * 8, n, lane() / 8 % 2 * 8, k));
        return BPair{{{{r[0], r[1]}}, {{r[2], r[3]}}}};
    }

    // b[k, n] from a tile that holds [k, n].
    template <class Tile>
    static JMLR_DEVICE BPair load_b_transposed(const Tile& tile, int n, int k) {
        uint32_t r[4];
        load_matrices_transposed(r, tile.at(lane() % 16, k, lane() / 16 * 8, n));
        return BPair{{{{r[0], r[1]}}, {{r[2], r[3]}}}};
    }

    // a[row, k] from accumulators: `c` points to the first of the kDepth / 8 that hold columns k .. k + kDepth - 1.
    static JMLR_DEVICE A from_accumulators(const float (*c)[4]) {
        return A{{pack<Element>(c[0][0], c[0][1]), pack<Element>(c[0][2], c[0][3]), pack<Element>(c[1][0], c[1][1]),
                  pack<Element>(c[1][2], c[1][3])}};
    }

    static JMLR_DEVICE void multiply(float (&c)[4], const A& a, const B& b) { multiply_add<Element>(c, a.r, b.r); }
};

template <>
struct Fragments<float> {
    static constexpr int kDepth = 8;

    // Within a fragment, slot t of k stands for k = 2t and slot t + 4 for 2t + 1, in a and b alike: a sum over k does
    // not mind, and accumulators become operands without moving between lanes.
    struct A {
        uint32_t high[4], low[4], finite[4];
    };
    struct B {
        uint32_t high[2], low[2], finite[2];
    };
    struct BPair {
        B b[2];
    };

    template <class Tile>
    static JMLR_DEVICE A load_a(const Tile& tile, int row, int down, int k) {
        int g = row + lane() / 4, t = lane() % 4 * 2;
        auto upper = pair(tile, g, down, t, k), lower = pair(tile, g, down + 8, t, k);
        return split_a(upper.first, lower.first, upper.second, lower.second);
    }
    template <class Tile>
    static JMLR_DEVICE A load_a(const Tile& tile, int row, int k) {
        return load_a(tile, row, 0, k);
    }

    template <class Tile>
    static JMLR_DEVICE A load_a_transposed(const Tile& tile, int row, int k) {
        int g = lane() / 4, t = lane() % 4 * 2;
        return split_a(tile.at(t, k, g, row).read(), tile.at(t, k, g, row + 8).read(), tile.at(t + 1, k, g, row).read(),
                       tile.at(t + 1, k, g, row + 8).read());
    }

    template <class Tile>
    static JMLR_DEVICE BPair load_b(const Tile& tile, int n, int k) {
        int g = lane() / 4, t = lane() % 4 * 2;
        auto left = pair(tile, g, n, t, k), right = pair(tile, g, n + 8, t, k);
        return BPair{{split_b(left.first, left.second), split_b(right.first, right.second)}};
    }

    template <class Tile>
    static JMLR_DEVICE BPair load_b_transposed(const Tile& tile, int n, int k) {
        int g = lane() / 4, t = lane() % 4 * 2;
        return BPair{{split_b(tile.at(t, k, g, n).read(), tile.at(t + 1, k, g, n).read()),
                      split_b(tile.at(t, k, g, n + 8).read(), tile.at(t + 1, k, g, n + 8).read())}};
    }

    static JMLR_DEVICE A from_accumulators(const float (*c)[4]) { return split_a(c[0][0], c[0][2], c[0][1], c[0][3]); }

    // Summed up outside of the tensor cores, which cut instead of rounding: over a long sum that costs several bits.
    static JMLR_DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
        float product[4] = {};
        multiply_add<Tf32>(product, a.low, b.finite);
        multiply_add<Tf32>(product, a.finite, b.low);
        multiply_add<Tf32>(product, a.high, b.high);
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) c[i] += product[i];
    }

private:
    template <class Tile>
    static JMLR_DEVICE typename Tile::Pair pair(const Tile& tile, int row, int down, int column, int right) {
        return tile.at(row, down, column, right).template as<typename Tile::Pair>().read();
    }

    // An infinite or NaN number has no lower part, and its upper part meets no lower one (`finite` is zero then):
    // neither infinity minus infinity nor infinity times zero may appear where the factors themselves have none.
    static JMLR_DEVICE void split(float x, uint32_t& high, uint32_t& low, uint32_t& finite) {
        high = to_tf32(x);
        bool infinite = (high & 0x7f800000u) == 0x7f800000u;
        float rest = x - bit_cast<float>(high);
        low = infinite ? 0u : to_tf32(rest);
        finite = infinite ? 0u : high;
    }

    static JMLR_DEVICE A split_a(float x0, float x1, float x2, float x3) {
        A a;
        split(x0, a.high[0], a.low[0], a.finite[0]);
        split(x1, a.high[1], a.low[1], a.finite[1]);
        split(x2, a.high[2], a.low[2], a.finite[2]);
        split(x3, a.high[3], a.low[3], a.finite[3]);
        return a;
    }

    static JMLR_DEVICE B split_b(float x0, float x1) {
        B b;
        split(x0, b.high[0], b.low[0], b.finite[0]);
        split(x1, b.high[1], b.low[1], b.finite[1]);
        return b;
    }
};

}  // namespace tiles
