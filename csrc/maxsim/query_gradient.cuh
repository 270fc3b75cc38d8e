// d(queries) and d(weights): a warp owns a query token (or a chunk of its embedding), walks the documents in order and
// adds the tokens that won, each times its score's gradient. Where query tokens are few (one query, thousands of
// documents) the documents are split among warps, whose sums FinishRows adds in order. Derivation:
// docs/maxsim-backward.md.
#pragma once

#include "gather.cuh"
#include "gradient_rule.cuh"
#include "tile_sizes.h"

namespace jmlr::maxsim {

// kDimension: columns that a warp holds, see gradient_dimension. kLanes share a row; with fewer than a warp's, groups
// of them share the documents, and their sums are added at the end. kAligned: slices are, and nobody asks.
template <class Element, int kDimension, int kLanes = tiles::kWarp, int kRows = kRowsUnderWay, bool kAligned = false>
struct QueryGradient {
    static constexpr int kThreads = kQueryGradientThreads;
    static constexpr int kMinBlocks = 3;
    static constexpr int kPerLane = kDimension / kLanes;

    struct Params {
        Problem problem;
        BackwardInput in;
        const int32_t* kept_lengths;  // of documents; null: winners are marked, or no document is masked
        Element* grad_queries;
        float* grad_weights;  // null: no weights
        float* parts;         // [splits, Nq * Lq, D]: sums for FinishRows; null: rows are finished here
        Divider query_length;
        int chunks;  // of the embedding
        int64_t splits, documents_per_split;
        bool whole, whole_queries;  // slices of documents (queries and sums) are aligned, and fill the embedding
    };

    static JMLR_DEVICE void run(const Params& p) {
        run_warp(p, tiles::block_index() * (kThreads / tiles::kWarp) + tiles::warp());
    }

    static JMLR_DEVICE void run_warp(const Params& p, int64_t task) {
        const Problem& problem = p.problem;
        int64_t row_count = problem.query_count * problem.query_length;
        int64_t row = task % row_count, chunk = task / row_count % p.chunks, split = task / row_count / p.chunks;
        if (split >= p.splits) return;
        int query = p.query_length.divide(int(row)), token = int(row) - query * p.query_length.divisor();
        int first = int(chunk) * kDimension + tiles::lane() % kLanes * kPerLane;
        Slice<kPerLane> sum{};
        if (p.in.code.marked || query_token_counts(problem, query, token)) {
            int64_t from = split * p.documents_per_split;
            int64_t to = tiles::smaller(from + p.documents_per_split, problem.documents_per_query);
            for (int64_t document = from; document < to; document += tiles::kWarp) {
                add_documents(p, query, token, document, to, first, sum);
            }
        }
        sum_groups<kLanes>(sum);
        int columns = tiles::lane() < kLanes ? int(problem.dimension) : 0;
        if (p.parts != nullptr) {
            store_slice(p.parts + (split * row_count + row) * problem.dimension, first, columns,
                        kAligned || p.whole_queries, sum);
        } else if (p.grad_weights == nullptr && p.in.query_scales == nullptr) {
            store_slice(p.grad_queries + row * problem.dimension, first, columns, kAligned || p.whole_queries, sum);
        } else {
            finish(p, query, token, row, columns, sum);
        }
    }

    static JMLR_DEVICE void finish(const Params& p, int64_t query, int64_t token, int64_t row, int columns,
                                   const Slice<kPerLane>& sum) {
        const Problem& problem = p.problem;
        RowEnd<Element, Element, kPerLane, kLanes> end{};
        end.row = query_row<Element>(problem, query, token);
        end.whole = kAligned || p.whole_queries;
        end.weighted = p.grad_weights != nullptr;
        end.normalized = p.in.query_scales != nullptr;
        if (end.weighted) end.weight = query_weight(problem, query, token);
        if (end.normalized) end.scale = tiles::load(p.in.query_scales + row);
        end.out = p.grad_queries + row * problem.dimension;
        end.grad_weight = end.weighted ? p.grad_weights + row : nullptr;
        end.finish(columns, [&](int) { return sum; });
    }

    // Adds a warp's width of documents, from `document` on.
    static JMLR_DEVICE void add_documents(const Params& p, int64_t query, int64_t token, int64_t document, int64_t last,
                                          int first, Slice<kPerLane>& sum) {
        const Problem& problem = p.problem;
        document += tiles::lane();
        bool won = document < last;
        int64_t place = 0;
        float factor = 0.0f;
        if (won) {
            int64_t pair = query * problem.documents_per_query + document;
            int winner = load_winner(p.in.winners, p.in.code.type, pair * problem.query_length + token);
            if (p.in.code.marked) won = winner != p.in.code.none;
            else if (p.kept_lengths != nullptr)
                won = tiles::load(p.kept_lengths + document_number(problem, query, document)) > 0;
            if (won) {
                factor = score_gradient(p.in.rule, problem, query, document, token);
                // A maximum that the loss does not look at: its winner may hold anything.
                if (p.in.rule.rule == Rule::tokens) won = factor != 0.0f;
            }
            if (won) {
                Text<Element> text = text_of<Element>(problem, query, document);
                place = text.first - static_cast<const Element*>(problem.documents) +
                        winner * problem.document_token_stride;
                if (p.in.document_scales != nullptr) factor *= tiles::load(p.in.document_scales + text.place + winner);
            }
        }
        uint32_t taken = tiles::ballot(won);
        const Element* base = static_cast<const Element*>(problem.documents);
        int columns = int(problem.dimension);
        if constexpr (kLanes == tiles::kWarp && kRows == kRowsUnderWay) {
            auto add = [&](int entry, const Slice<kPerLane>& row) {
                add_scaled(sum, tiles::shuffle(factor, entry), row);
            };
            if (kAligned || p.whole) for_each_row<true, kPerLane>(base, place, taken, first, columns, add);
            else for_each_row<false, kPerLane>(base, place, taken, first, columns, add);
        } else {
            auto add = [&](int entry, bool, const Slice<kPerLane>& row) {
                add_scaled(sum, tiles::shuffle(factor, entry), row);
            };
            if (kAligned || p.whole)
                for_each_row_in_groups<true, kPerLane, kLanes, kRows>(base, place, taken, first, columns, add);
            else for_each_row_in_groups<false, kPerLane, kLanes, kRows>(base, place, taken, first, columns, add);
        }
    }
};

}  // namespace jmlr::maxsim
