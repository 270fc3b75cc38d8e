// Forward pass: one launch over all query heads of both halves, no copy of q, k or v.
//
// A block owns a tile of queries of one head and walks the keys of its group(s) alone, with FlashAttention-2's running
// maximum and sum (Dao, arXiv 2307.08691), in base 2. Key tiles before the diagonal need no mask when all the queries
// lie in one group; the rest are masked by start(i) <= j <= i. The values of a tile are copied while its scores are
// computed, the next keys while its weights multiply the values.
#pragma once

#include "../tiles/bands.h"
#include "../tiles/launch.h"
#include "head_rows.h"
#include "tile_sizes.h"

namespace jmlr::shifted_attention {

template <class Element>
struct ForwardParams {
    Layout layout;
    Rows<const Element> q, k, v;
    Rows<Element> out;
    float* lse;
    int head_dim;
    float scale_log2;
};

template <class Element, int kBlockD, SharedMemory kShared>
struct Forward {
    static constexpr TileSizes kSizes = tile_sizes(Kernel::forward, int(sizeof(Element)), kBlockD, kShared);
    static constexpr int kBlockM = kSizes.block_m, kBlockN = kSizes.block_n, kBands = kSizes.bands,
                         kParts = kSizes.parts;
    static constexpr int kThreads = threads_of(Kernel::forward, kSizes), kMinBlocks = kSizes.min_blocks;
    static constexpr int kPartD = kBlockD / kParts;

    using Params = ForwardParams<Element>;
    using Fragments = tiles::Fragments<Element>;
    using QueryTile = tiles::SharedTile<Element, kBlockM, kBlockD>;
    using KeyTile = tiles::SharedTile<Element, kBlockN, kBlockD>;
    using Scores = float[kBands][kBlockN / 8][4];
    using Sums = float[kBands][kPartD / 8][4];
    static constexpr int kSharedBytes = QueryTile::kBytes + 2 * KeyTile::kBytes;
    static_assert(kSharedBytes <= bytes_of(kShared));

    static JMLR_DEVICE void run(const Params& p) {
        Work work = work_of<kBlockM, true>(p.layout, int(tiles::block_index()), p.layout.heads);
        const Document& document = work.document;
        if (work.tile >= document.owned) return;
        Groups groups = groups_of(p.layout, work.head, document.length);

        Sums out = {};
        Softmax softmax;
        if (work.tile < document.length) attend(p, work, groups, out, softmax);
        finish(p, work, groups, out, softmax);
    }

private:
    // The running softmax of a lane's rows: of each band, the one at lane / 4 and the one eight below. `total` is of
    // the lane's own columns.
    struct Softmax {
        float largest[kBands][2], total[kBands][2];

        JMLR_DEVICE Softmax() {
            JMLR_UNROLL
            for (int band = 0; band < kBands; ++band) {
                for (int half = 0; half < 2; ++half) largest[band][half] = -tiles::kInfinity, total[band][half] = 0;
            }
        }

        // Scores times `factor`, which is positive, become weights; `out`, the sums of what came before, is brought to
        // their scale.
        JMLR_DEVICE void take(Scores& scores, float factor, Sums& out) {
            JMLR_UNROLL
            for (int band = 0; band < kBands; ++band) {
                JMLR_UNROLL
                for (int half = 0; half < 2; ++half) {
                    float& top = largest[band][half];
                    float new_top = scores[band][0][2 * half];
                    JMLR_UNROLL
                    for (int n = 0; n < kBlockN / 8; ++n) {
                        new_top = fmaxf(new_top, fmaxf(scores[band][n][2 * half], scores[band][n][2 * half + 1]));
                    }
                    new_top = fmaxf(top, tiles::row_maximum(new_top) * factor);
                    // Rows that see no key yet: -inf minus -inf must not appear.
                    float reference = new_top == -tiles::kInfinity ? 0 : new_top;
                    float rescale = tiles::exp2_approximate(top - reference), sum = 0;
                    JMLR_UNROLL
                    for (int n = 0; n < kBlockN / 8; ++n) {
                        JMLR_UNROLL
                        for (int i = 2 * half; i < 2 * half + 2; ++i) {
                            scores[band][n][i] = tiles::exp2_approximate(scores[band][n][i] * factor - reference);
                            sum += scores[band][n][i];
                        }
                    }
                    total[band][half] = total[band][half] * rescale + sum;
                    top = new_top;
                    JMLR_UNROLL
                    for (int n = 0; n < kPartD / 8; ++n) {
                        out[band][n][2 * half] *= rescale;
                        out[band][n][2 * half + 1] *= rescale;
                    }
                }
            }
        }
    };

    static JMLR_DEVICE void attend(const Params& p, const Work& work, const Groups& groups, Sums& out,
                                   Softmax& softmax) {
        QueryTile queries(0);
        KeyTile keys(QueryTile::kBytes), values(QueryTile::kBytes + KeyTile::kBytes);
        int end = smaller(work.tile + kBlockM, work.document.length), begin = groups.start(work.tile);
        // Key tiles up to this position hold nothing that any of the queries may not see. Maxima are taken before the
        // scale, so one that is not positive must be multiplied in first, which the mask does.
        bool plain = groups.start(end - 1) == begin && p.scale_log2 > 0;
        int unmasked = plain ? work.tile + 1 - kBlockN : begin - 1;
        int kv_head = work.head / p.layout.ratio;
        int row = tiles::warp() / kParts * 16 * kBands, column = tiles::warp() % kParts * kPartD;
        auto copy = [&](const auto& to, const auto& rows, int head, int tile) {
            load_rows<kThreads>(to, rows, work.document, head, groups, tile, end, p.head_dim);
        };

        copy(queries, p.q, work.head, work.tile);
        copy(keys, p.k, kv_head, begin);
        tiles::commit_copies();
        for (int tile = begin; tile < end; tile += kBlockN) {
            tiles::wait_copies<0>();
            tiles::sync_block();  // the keys are there, and nobody needs the values of the tile before
            copy(values, p.v, kv_head, tile);
            tiles::commit_copies();

            Scores scores = {};
            tiles::multiply_bands<Fragments, kBlockD, kSizes.unroll>(
                scores, [&](int band, int k) { return Fragments::load_a(queries, row, 16 * band, k); },
                [&](int n, int k) { return Fragments::load_b(keys, n, k); });
            float factor = p.scale_log2;
            if (tile > unmasked) {
                mask(scores, factor, groups, work.tile + row, tile);
                factor = 1;
            }
            softmax.take(scores, factor, out);

            tiles::wait_copies<0>();
            tiles::sync_block();  // the values are there, and nobody needs the keys
            if (tile + kBlockN < end) copy(keys, p.k, kv_head, tile + kBlockN);
            tiles::commit_copies();
            tiles::multiply_bands<Fragments, kBlockN>(
                out, [&](int band, int k) { return Fragments::from_accumulators(&scores[band][k / 8]); },
                [&](int n, int k) { return Fragments::load_b_transposed(values, column + n, k); });
        }
        tiles::wait_copies<0>();
    }

    // Scores take the scale, and -inf where a query may not attend.
    static JMLR_DEVICE void mask(Scores& scores, float scale_log2, const Groups& groups, int query, int key) {
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                int position = query + 16 * band + tiles::accumulator_row(2 * half), start = groups.start(position);
                JMLR_UNROLL
                for (int n = 0; n < kBlockN / 8; ++n) {
                    JMLR_UNROLL
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        int key_position = key + 8 * n + tiles::accumulator_column(i);
                        bool attends = key_position >= start && key_position <= position;
                        scores[band][n][i] = attends ? scores[band][n][i] * scale_log2 : -tiles::kInfinity;
                    }
                }
            }
        }
    }

    static JMLR_DEVICE void finish(const Params& p, const Work& work, const Groups& groups, Sums& out,
                                   const Softmax& softmax) {
        QueryTile staged(0);
        const Document& document = work.document;
        float* lse = p.lse + (int64_t(document.batch) * p.layout.heads + work.head) * p.layout.rows + document.first;
        int row = tiles::warp() / kParts * 16 * kBands, part = tiles::warp() % kParts;
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                int position = work.tile + row + 16 * band + tiles::accumulator_row(2 * half);
                bool inside = position < document.length;
                float total = tiles::row_sum(softmax.total[band][half]), inverse = 1 / total;
                JMLR_UNROLL
                for (int n = 0; n < kPartD / 8; ++n) {
                    for (int i = 2 * half; i < 2 * half + 2; ++i)
                        out[band][n][i] = inside ? out[band][n][i] * inverse : 0;
                }
                if (part == 0 && tiles::lane() % 4 == 0 && position < document.owned) {
                    float log_sum = (softmax.largest[band][half] + tiles::log2_accurate(total)) * tiles::kLn2;
                    tiles::store(lse + groups.token(position), inside ? log_sum : tiles::kInfinity);
                }
            }
        }
        tiles::write_bands(staged, row, part * kPartD, out);
        tiles::sync_block();
        store_rows<kThreads>(staged, p.out, document, work.head, groups, work.tile, p.head_dim);
    }
};

}  // namespace jmlr::shifted_attention
