// Tiles of query rows, whatever the kernel that owns them: whose each row is, and the scores that rows add up to.
//
// Params: query_length (a Divider), queries_per_tile, lanes_per_query, scores, problem. Tile: first_query, and for a
// query longer than a tile, which chunk of it.
#pragma once

#include "rows.cuh"

namespace jmlr::maxsim {

struct QueryRow {
    int64_t query;
    int token;
    bool inside;
};

template <int kRows, class Params, class Tile>
JMLR_DEVICE QueryRow query_row_of(const Params& p, const Tile& tile, int row) {
    int place = tile.chunk * kRows + row;
    int segment = p.query_length.divide(place);
    int64_t query = tile.first_query + segment;
    return {query, place - segment * p.query_length.divisor(),
            segment < p.queries_per_tile && query < p.problem.query_count};
}

// A document's scores: sums of `share(row)` over a query's rows, or `nobody` where none `counts`. By kThreads threads
// that are whole warps, of which the calling one is number `thread`.
template <int kRows, int kThreads, class Params, class Tile, class Share>
JMLR_DEVICE void store_scores(const Params& p, const Tile& tile, int thread, int64_t number, bool counts, float nobody,
                              Share share) {
    const Problem& problem = p.problem;
    // Neighbouring lanes add a query's rows, then each other's sums.
    int lanes = p.lanes_per_query, per_round = kThreads / lanes;
    for (int first = 0; first < p.queries_per_tile; first += per_round) {
        int segment = first + thread / lanes;
        int64_t query = tile.first_query + segment;
        bool inside = segment < p.queries_per_tile && query < problem.query_count;
        float sum = 0.0f;
        if (inside && counts) {
            int begin = segment * p.query_length.divisor();
            int end = tiles::smaller(begin + p.query_length.divisor() - tile.chunk * kRows, kRows);
            for (int row = begin + thread % lanes; row < end; row += lanes) sum += share(row);
        }
        for (int mask = 1; mask < lanes; mask *= 2) sum += tiles::shuffle_xor(sum, mask);
        if (inside && thread % lanes == 0) {
            int64_t pair = (tile.chunk * problem.query_count + query) * problem.documents_per_query + number;
            tiles::store(p.scores + pair, counts ? sum : nobody);
        }
    }
}

}  // namespace jmlr::maxsim
