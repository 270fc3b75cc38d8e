// What both kernels of d(documents) know: which tokens of a document a block works on, and which query tokens they won.
#pragma once

#include "gather.cuh"
#include "gradient_rule.cuh"

namespace jmlr::maxsim {

template <class Element>
struct DocumentTile {
    int first_query;  // the first that meets the document
    int document;     // among the documents of a query; a grid has fewer than 2**31 blocks
    Text<Element> text;
    int first_token;
    int first_column;
    int row_count;  // query tokens that meet the document
};

struct QueryToken {
    int64_t query;
    int token;
};

// A kernel's Params have the problem, the input, the query length as a divider, and kept lengths (see QueryGradient).
template <class Element, class Params>
JMLR_DEVICE DocumentTile<Element> tile_of_document(const Params& p, int64_t number, int first_column) {
    const Problem& problem = p.problem;
    DocumentTile<Element> tile;
    tile.first_column = first_column;
    tile.first_query = problem.candidates ? int(number / problem.documents_per_query) : 0;
    tile.document = int(number - tile.first_query * problem.documents_per_query);
    tile.text = text_of<Element>(problem, tile.first_query, tile.document);
    tile.first_token = 0;
    tile.row_count = int(problem.query_length * (problem.candidates ? 1 : problem.query_count));
    if (p.kept_lengths != nullptr && tiles::load(p.kept_lengths + number) == 0) tile.row_count = 0;
    return tile;
}

template <class Element, class Params>
JMLR_DEVICE QueryToken query_token(const Params& p, const DocumentTile<Element>& tile, int row) {
    int query = p.query_length.divide(row);
    return {int64_t(tile.first_query) + query, row - query * p.query_length.divisor()};
}

// Where the winner of a query token in the tile's document is saved.
template <class Element, class Params>
JMLR_DEVICE int64_t winner_place(const Params& p, const DocumentTile<Element>& tile, QueryToken q) {
    int64_t pair = q.query * p.problem.documents_per_query + tile.document;
    return pair * p.problem.query_length + q.token;
}

// Whether a query token's winner lies in the tile of `tokens`; `token`: the winner, counted from the tile's first.
template <class Element, class Params>
JMLR_DEVICE bool lies_in_tile(const Params& p, const DocumentTile<Element>& tile, QueryToken q, int token, int tokens) {
    if (token < 0 || token >= tokens) return false;
    int winner = tile.first_token + token;
    if (p.in.code.marked ? winner == p.in.code.none : !query_token_counts(p.problem, q.query, q.token)) return false;
    if (p.in.rule.rule != Rule::tokens) return true;
    // A maximum that the loss does not look at: its query token may hold anything.
    return maximum_gradient(p.in.rule, p.problem, q.query, tile.document, q.token) != 0.0f;
}

// By what a query token's row is multiplied on its way to its winner: `gradient` is that of the score.
template <class Params>
JMLR_DEVICE float row_factor(const Params& p, QueryToken q, float gradient) {
    const Problem& problem = p.problem;
    if (problem.query_weights != nullptr) gradient *= query_weight(problem, q.query, q.token);
    if (p.in.query_scales != nullptr) {
        gradient *= tiles::load(p.in.query_scales + q.query * problem.query_length + q.token);
    }
    return gradient;
}

}  // namespace jmlr::maxsim
