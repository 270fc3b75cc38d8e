// Both gradients of MaxSim are sums of gathered rows: d(query token) of the document tokens that won for it, d(document
// token) of the query tokens that it won. A warp gathers; a lane holds a slice of every row.
#pragma once

#include "../tiles/launch.h"
#include "rows.cuh"

namespace jmlr::maxsim {

// Rows under way at a time: what hides the latency of memory.
constexpr int kRowsUnderWay = 8;

// Lane l holds an entry: the place of a row (elements from `base`). Calls add(l, slice) for the entries in `taken`, in
// their order, with the lane's slice of the row. `first`: the slice's column; kWhole: slices are aligned, and `columns`
// is a multiple of their length.
template <bool kWhole, int kPerLane, class Element, class Add>
JMLR_DEVICE void for_each_row(const Element* base, int64_t place, uint32_t taken, int first, int columns, Add add) {
    while (taken != 0) {
        Slice<kPerLane> rows[kRowsUnderWay];
        uint32_t left = taken;
        JMLR_UNROLL
        for (int i = 0; i < kRowsUnderWay; ++i) {
            int64_t row = tiles::shuffle(place, tiles::larger(tiles::lowest_bit(left), 0));
            if (left != 0 && first < columns) rows[i] = load_slice<kPerLane>(base + row, first, columns, kWhole);
            else rows[i] = Slice<kPerLane>{};
            left &= left - 1;
        }
        JMLR_UNROLL
        for (int i = 0; i < kRowsUnderWay; ++i) {
            if (taken != 0) add(tiles::lowest_bit(taken), rows[i]);
            taken &= taken - 1;
        }
    }
}

// The same where kLanes lanes share a row: 16 bytes each, so that a load of the warp takes several rows. Every group of
// kLanes has its own entries, those that its lanes hold, and its own sum. All lanes call add(lane of the entry, whether
// there is one, slice), with zeros in place of what is not taken, for all of kRows entries or for none.
template <bool kWhole, int kPerLane, int kLanes, int kRows, class Element, class Add>
JMLR_DEVICE void for_each_row_in_groups(const Element* base, int64_t place, uint32_t taken, int first, int columns,
                                        Add add) {
    using Neighbours = Word<kPerLane* int(sizeof(Element))>;
    static_assert(kLanes % kRows == 0);
    constexpr int kUnderWay = kWhole ? kRows : 1;  // rare: few registers instead
    constexpr uint32_t kFirstLanes = 0xffffffffu / uint32_t((uint64_t(1) << kLanes) - 1);  // of every group
    const int group = tiles::lane() / kLanes * kLanes;
    JMLR_UNROLL_BY(1)
    for (int start = 0; start < kLanes; start += kUnderWay) {
        if ((taken & kFirstLanes * ((1u << kUnderWay) - 1) << start) == 0) continue;
        const uint32_t own = taken >> group >> start;
        Neighbours rows[kUnderWay];
        Slice<kPerLane> slice{};
        JMLR_UNROLL
        for (int i = 0; i < kUnderWay; ++i) {
            const Element* row = base + tiles::shuffle(place, group + start + i);
            bool inside = (own & 1u << i) != 0 && first < columns;
            if constexpr (!kWhole) {
                if (inside) slice = load_slice<kPerLane>(row, first, columns, false);
            } else {
                if (inside) rows[i] = tiles::load(reinterpret_cast<const Neighbours*>(row + first));
                else rows[i] = Neighbours{};
            }
        }
        JMLR_UNROLL
        for (int i = 0; i < kUnderWay; ++i) {
            if constexpr (kWhole) slice = slice_of<kPerLane, Element>(rows[i]);
            add(group + start + i, (own & 1u << i) != 0, slice);
        }
    }
}

// The groups' sums become one, the same in all.
template <int kLanes, int kPerLane>
JMLR_DEVICE void sum_groups(Slice<kPerLane>& sum) {
    JMLR_UNROLL
    for (int mask = kLanes; mask < tiles::kWarp; mask *= 2) {
        JMLR_UNROLL
        for (int i = 0; i < kPerLane; ++i) sum.value[i] += tiles::shuffle_xor(sum.value[i], mask);
    }
}

template <int kPerLane>
JMLR_DEVICE void add_scaled(Slice<kPerLane>& sum, float factor, const Slice<kPerLane>& row) {
    JMLR_UNROLL
    for (int i = 0; i < kPerLane; ++i) sum.value[i] += factor * row.value[i];
}

// Scales of vectors shorter than the norm's floor: the floor is a constant, so they have no Jacobian but the scale.
constexpr float kFloorScale = 9.99e11f;

// What a row of sums becomes: d(weight) is its product with the (normalised) row itself; d(row) passes the Jacobian of
// u = x scale, which is (du - u <u, du>) scale, and takes the weight. A row of zeros stays zero whatever the rest
// holds. `total(first)` gives the slice of sums at a column; `row` is not read unless weighted or normalised. kLanes
// lanes share a row; all lanes of the warp call, those without a row with no columns.
template <class Element, class Out, int kPerLane, int kLanes = tiles::kWarp>
struct RowEnd {
    const Element* row;
    bool whole;  // of row and out
    bool weighted, normalized;
    float weight, scale;
    Out* out;
    float* grad_weight;  // null: not asked for

    template <class Total>
    JMLR_DEVICE void finish(int columns, Total total) const {
        float dot = 0.0f;
        if (weighted || normalized) {
            for (int first = tiles::lane() % kLanes * kPerLane; first < columns; first += kLanes * kPerLane) {
                Slice<kPerLane> sum = total(first), unit = load_slice<kPerLane>(row, first, columns, whole);
                JMLR_UNROLL
                for (int i = 0; i < kPerLane; ++i) {
                    if (sum.value[i] != 0.0f)
                        dot += sum.value[i] * (normalized ? unit.value[i] * scale : unit.value[i]);
                }
            }
            dot = warp_sum<kLanes>(dot);
        }
        if (grad_weight != nullptr && tiles::lane() == 0) tiles::store(grad_weight, dot);
        float along = scale >= kFloorScale ? 0.0f : dot;
        for (int first = tiles::lane() % kLanes * kPerLane; first < columns; first += kLanes * kPerLane) {
            Slice<kPerLane> sum = total(first);
            if (normalized) {
                Slice<kPerLane> unit = load_slice<kPerLane>(row, first, columns, whole);
                JMLR_UNROLL
                for (int i = 0; i < kPerLane; ++i) {
                    bool still = sum.value[i] == 0.0f && along == 0.0f;
                    sum.value[i] = still ? 0.0f : (sum.value[i] - unit.value[i] * scale * along) * scale;
                }
            }
            if (weighted) {
                JMLR_UNROLL
                for (int i = 0; i < kPerLane; ++i) sum.value[i] = sum.value[i] == 0.0f ? 0.0f : sum.value[i] * weight;
            }
            store_slice(out, first, columns, whole, sum);
        }
    }
};

// RowEnd for rows of sums in memory, of several parts that are added in order. A warp owns a row.
template <class Element>
struct FinishRows {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kPerLane = 4;

    struct Params {
        const float* parts;  // [part_count, rows, dimension]
        int64_t part_count;
        TokenList<Element> tokens;
        int dimension;
        bool whole;
        const float* weights;  // of tokens [1, inner, length]; null: none
        int64_t weight_stride, weight_token_stride;
        const float* scales;  // null: not normalised
        Element* out;
        float* grad_weights;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t number = tiles::block_index() * (kThreads / tiles::kWarp) + tiles::warp();
        int64_t count = p.tokens.count();
        if (number >= count) return;
        RowEnd<Element, Element, kPerLane> end{};
        end.row = p.tokens.row(number);
        end.whole = p.whole;
        end.weighted = p.weights != nullptr;
        end.normalized = p.scales != nullptr;
        if (end.weighted) {
            int64_t query = number / p.tokens.length, token = number - query * p.tokens.length;
            end.weight = tiles::load(p.weights + query * p.weight_stride + token * p.weight_token_stride);
        }
        if (end.normalized) end.scale = tiles::load(p.scales + number);
        end.out = p.out + number * p.dimension;
        end.grad_weight = p.grad_weights == nullptr ? nullptr : p.grad_weights + number;
        end.finish(p.dimension, [&](int first) {
            Slice<kPerLane> sum{};
            for (int64_t part = 0; part < p.part_count; ++part) {
                const float* row = p.parts + (part * count + number) * p.dimension;
                add_scaled(sum, 1.0f, load_slice<kPerLane>(row, first, p.dimension, p.whole));
            }
            return sum;
        });
    }
};

}  // namespace jmlr::maxsim
