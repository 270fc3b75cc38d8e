// delta = rowsum(grad_out * out), and dq: a block owns a tile of queries of one head and walks the keys of its
// group(s), in two stages of keys and values.
#pragma once

#include "backward.cuh"

namespace jmlr::shifted_attention {

template <class Element, int kBlockD, SharedMemory kShared>
struct BackwardDq {
    static constexpr TileSizes kSizes = tile_sizes(Kernel::backward_dq, int(sizeof(Element)), kBlockD, kShared);
    static constexpr int kBlockM = kSizes.block_m, kBlockN = kSizes.block_n, kBands = kSizes.bands,
                         kParts = kSizes.parts;
    static constexpr int kThreads = threads_of(Kernel::backward_dq, kSizes), kMinBlocks = kSizes.min_blocks;
    static constexpr int kPartD = kBlockD / kParts;

    using Params = BackwardParams<Element>;
    using Fragments = tiles::Fragments<Element>;
    using QueryTile = tiles::SharedTile<Element, kBlockM, kBlockD>;
    using KeyTile = tiles::SharedTile<Element, kBlockN, kBlockD>;
    using Scores = float[kBands][kBlockN / 8][4];
    using Sums = float[kBands][kPartD / 8][4];
    static constexpr int kStage = 2 * KeyTile::kBytes;
    static constexpr int kSharedBytes = 2 * QueryTile::kBytes + 2 * kStage;
    static_assert(kSharedBytes <= bytes_of(kShared));

    static JMLR_DEVICE void run(const Params& p) {
        Work work = work_of<kBlockM, true>(p.layout, int(tiles::block_index()), p.layout.heads);
        const Document& document = work.document;
        if (work.tile >= document.owned) return;
        Groups groups = groups_of(p.layout, work.head, document.length);
        Sums dq = {};
        if (work.tile < document.length) walk_keys(p, work, groups, dq);

        QueryTile staged(0);
        int row = tiles::warp() / kParts * 16 * kBands, column = tiles::warp() % kParts * kPartD;
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int n = 0; n < kPartD / 8; ++n) {
                JMLR_UNROLL
                for (int i = 0; i < 4; ++i) dq[band][n][i] *= p.scale;
            }
        }
        tiles::sync_block();
        tiles::write_bands(staged, row, column, dq);
        tiles::sync_block();
        store_rows<kThreads>(staged, p.dq, document, work.head, groups, work.tile, p.head_dim);
    }

private:
    // Of a lane's rows: lse in base 2, and delta.
    struct Statistics {
        float log_sum[kBands][2], delta[kBands][2];
    };

    static JMLR_DEVICE void walk_keys(const Params& p, const Work& work, const Groups& groups, Sums& dq) {
        QueryTile queries(0), grads(QueryTile::kBytes);
        int end = smaller(work.tile + kBlockM, work.document.length), begin = groups.start(work.tile);
        // Key tiles up to this position hold nothing that any of the queries may not see.
        int unmasked = groups.start(end - 1) == begin ? work.tile + 1 - kBlockN : begin - 1;
        int kv_head = work.head / p.layout.ratio;
        int row = tiles::warp() / kParts * 16 * kBands, column = tiles::warp() % kParts * kPartD;
        auto copy = [&](const auto& to, const auto& rows, int head, int tile) {
            load_rows<kThreads>(to, rows, work.document, head, groups, tile, end, p.head_dim);
        };
        auto copy_keys = [&](int stage, int tile) {
            copy(KeyTile(2 * QueryTile::kBytes + stage * kStage), p.k, kv_head, tile);
            copy(KeyTile(2 * QueryTile::kBytes + stage * kStage + KeyTile::kBytes), p.v, kv_head, tile);
        };

        copy(queries, p.q, work.head, work.tile);
        copy(grads, p.grad_out, work.head, work.tile);
        tiles::commit_copies();
        copy_keys(0, begin);
        tiles::commit_copies();
        tiles::wait_copies<1>();
        tiles::sync_block();
        Statistics statistics = statistics_of_rows(p, work, groups, grads, end);

        for (int tile = begin, stage = 0; tile < end; tile += kBlockN, stage ^= 1) {
            tiles::wait_copies<0>();
            tiles::sync_block();  // this stage is there, and nobody needs the other
            if (tile + kBlockN < end) copy_keys(stage ^ 1, tile + kBlockN);
            tiles::commit_copies();
            KeyTile keys(2 * QueryTile::kBytes + stage * kStage),
                values(2 * QueryTile::kBytes + stage * kStage + KeyTile::kBytes);

            Scores scores = {}, grad_weights = {};
            tiles::multiply_bands<Fragments, kBlockD, kSizes.unroll>(
                scores, [&](int band, int k) { return Fragments::load_a(queries, row, 16 * band, k); },
                [&](int n, int k) { return Fragments::load_b(keys, n, k); });
            tiles::multiply_bands<Fragments, kBlockD, kSizes.unroll>(
                grad_weights, [&](int band, int k) { return Fragments::load_a(grads, row, 16 * band, k); },
                [&](int n, int k) { return Fragments::load_b(values, n, k); });
            JMLR_UNROLL
            for (int band = 0; band < kBands; ++band) {
                JMLR_UNROLL
                for (int n = 0; n < kBlockN / 8; ++n) {
                    JMLR_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        scores[band][n][i] = tiles::exp2_approximate(scores[band][n][i] * p.scale_log2 -
                                                                     statistics.log_sum[band][i / 2]);
                    }
                }
            }
            if (tile > unmasked) mask(scores, groups, work.tile + row, tile);
            JMLR_UNROLL
            for (int band = 0; band < kBands; ++band) {
                JMLR_UNROLL
                for (int n = 0; n < kBlockN / 8; ++n) {
                    JMLR_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        scores[band][n][i] *= grad_weights[band][n][i] - statistics.delta[band][i / 2];
                    }
                }
            }
            tiles::multiply_bands<Fragments, kBlockN>(
                dq, [&](int band, int k) { return Fragments::from_accumulators(&scores[band][k / 8]); },
                [&](int n, int k) { return Fragments::load_b_transposed(keys, column + n, k); });
        }
        tiles::wait_copies<0>();
    }

    // The four lanes that share a row of the accumulators sum up its products of grad_out and out.
    static JMLR_DEVICE Statistics statistics_of_rows(const Params& p, const Work& work, const Groups& groups,
                                                     const QueryTile& grads, int end) {
        Statistics statistics;
        const Document& document = work.document;
        int64_t first = statistics_of(p.layout, document, work.head);
        int row = tiles::warp() / kParts * 16 * kBands, part = tiles::warp() % kParts;
        JMLR_UNROLL
        for (int band = 0; band < kBands; ++band) {
            JMLR_UNROLL
            for (int half = 0; half < 2; ++half) {
                int tile_row = row + 16 * band + tiles::accumulator_row(2 * half), position = work.tile + tile_row;
                float sum = 0, log_sum = tiles::kInfinity;
                if (position < end) {
                    int token = groups.token(position);
                    const Element* out = p.out.data + document.batch * p.out.batch_stride +
                                         int64_t(document.first + token) * p.out.token_stride +
                                         work.head * p.out.head_stride;
                    sum = partial_product(grads, tile_row, out, p.head_dim, p.out.whole_chunks);
                    log_sum = tiles::load(p.lse + first + token) * tiles::kLog2E;
                }
                statistics.log_sum[band][half] = log_sum;
                statistics.delta[band][half] = tiles::row_sum(sum);
                if (part == 0 && tiles::lane() % 4 == 0 && position < end) {
                    tiles::store(p.delta + first + groups.token(position), statistics.delta[band][half]);
                }
            }
        }
        return statistics;
    }

    static JMLR_DEVICE float partial_product(const QueryTile& grads, int row, const Element* out, int head_dim,
                                             bool whole_chunks) {
        constexpr int kPerChunk = QueryTile::kPerChunk;
        float sum = 0;
        for (int column = tiles::lane() % 4 * kPerChunk; column < head_dim; column += 4 * kPerChunk) {
            if (whole_chunks) {
                auto ours = tiles::bit_cast<Chunk>(tiles::load(reinterpret_cast<const tiles::Chunk*>(out + column)));
                auto theirs = tiles::bit_cast<Chunk>(grads.at(row, column).template as<tiles::Chunk>().read());
                JMLR_UNROLL
                for (int j = 0; j < kPerChunk; ++j)
                    sum += tiles::to_float(ours.element[j]) * tiles::to_float(theirs.element[j]);
            } else {
                for (int j = column; j < smaller(column + kPerChunk, head_dim); ++j) {
                    sum += tiles::to_float(tiles::load(out + j)) * tiles::to_float(grads.read(row, j));
                }
            }
        }
        return sum;
    }

    struct Chunk {
        Element element[QueryTile::kPerChunk];
    };

    static JMLR_DEVICE void mask(Scores& weights, const Groups& groups, int query, int key) {
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
                        weights[band][n][i] = attends ? weights[band][n][i] : 0;
                    }
                }
            }
        }
    }
};

}  // namespace jmlr::shifted_attention
