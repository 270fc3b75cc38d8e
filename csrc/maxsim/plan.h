// How a MaxSim problem is laid out over blocks, and the scratch memory that this takes: host arithmetic, nothing else.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "problem.h"
#include "tile_sizes.h"

namespace jmlr::maxsim {

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int element_size(Type type) { return type == Type::float32 ? 4 : 2; }

inline int64_t document_token_count(const Problem& p) {
    return p.packed() ? p.packed_tokens : p.document_count() * p.document_length;
}

// Sizes that positions and row numbers in 32 bits cannot hold.
inline void check_sizes(const Problem& p) {
    constexpr int64_t kLimit = int64_t(1) << 31;
    if (p.query_count * p.query_length >= kLimit / 2) {
        throw std::runtime_error("maxsim on CUDA takes fewer than 2**30 query tokens: split the queries");
    }
    if (p.document_length >= kLimit || p.dimension >= kLimit) {
        throw std::runtime_error(
            "maxsim on CUDA takes documents of fewer than 2**31 tokens, of fewer than 2**31 dimensions");
    }
}

// Grows by arrays; each starts at a multiple of 16 bytes.
class Scratch {
public:
    int64_t add(int64_t bytes) {
        int64_t at = bytes_;
        bytes_ += (bytes + 15) / 16 * 16;
        return at;
    }
    int64_t bytes() const { return bytes_; }

private:
    int64_t bytes_ = 0;
};

// Row tiles of all queries, row tiles of one query (1 unless it is longer than a tile), queries in a tile.
struct RowLayout {
    int64_t row_tiles = 0;
    int row_chunks = 0, queries_per_tile = 0;
};

inline RowLayout row_layout(const Problem& p, int64_t rows) {
    RowLayout layout;
    layout.row_chunks = int(divided_up(p.query_length, rows));
    layout.queries_per_tile = p.candidates || p.query_length > rows ? 1 : int(rows / p.query_length);
    layout.row_tiles = divided_up(p.query_count, layout.queries_per_tile) * layout.row_chunks;
    return layout;
}

// Lanes that add a query's rows: a power of two.
inline int lanes_per_query(int64_t query_length) {
    int lanes = 1;
    while (lanes < 32 && lanes < query_length) lanes *= 2;
    return lanes;
}

struct ForwardPlan : RowLayout {
    int dimension_block = 0;
    bool few_rows = false;
    int64_t documents_per_block = 0;
    int lanes_per_query = 0;
    // Byte offsets of scratch arrays, -1 where there is none.
    int64_t kept = -1, kept_lengths = -1, parts = -1;
    int64_t scratch_bytes = 0;
};

// The number of documents that leaves the multiprocessors idle least: blocks start in waves, and a wave lasts as long
// as a run of documents. Of equals the longest run, which loads the query rows least often.
inline int64_t documents_per_block(int64_t documents, int64_t row_tiles, int64_t slots) {
    constexpr int64_t kLongestRun = 16;  // beyond, rows are reused enough
    int64_t best = 1, shortest = INT64_MAX;
    for (int64_t run = 1; run <= kLongestRun && run <= documents; ++run) {
        int64_t length = divided_up(row_tiles * divided_up(documents, run), slots) * run;
        if (length <= shortest) {
            shortest = length;
            best = run;
        }
    }
    return best;
}

// `tiles_of`: the tile sizes of the kernel.
inline ForwardPlan forward_plan(const Problem& p, const ForwardOutput& out, int processors,
                                ForwardTiles (*tiles_of)(int, int, bool) = forward_tiles) {
    check_sizes(p);
    ForwardPlan plan;
    plan.dimension_block = forward_dimension(p.dimension);
    int64_t sharing = p.query_length * (p.candidates ? 1 : p.query_count);
    ForwardTiles tiles = tiles_of(element_size(p.type), plan.dimension_block, false);
    plan.few_rows = 2 * sharing <= tiles.rows();
    if (plan.few_rows) tiles = tiles_of(element_size(p.type), plan.dimension_block, true);
    int64_t rows = tiles.rows();
    if (p.query_length == 0 || p.query_count == 0 || p.documents_per_query == 0) return plan;
    static_cast<RowLayout&>(plan) = row_layout(p, rows);
    plan.documents_per_block =
        documents_per_block(p.documents_per_query, plan.row_tiles, int64_t(processors) * tiles.min_blocks);
    plan.lanes_per_query = lanes_per_query(p.query_length);
    Scratch scratch;
    if (p.document_mask != nullptr) {
        plan.kept = scratch.add(document_token_count(p) * 4);
        plan.kept_lengths = scratch.add(p.document_count() * 4);
    }
    if (plan.row_chunks > 1 && !out.per_token) {
        plan.parts = scratch.add(plan.row_chunks * p.query_count * p.documents_per_query * 4);
    }
    plan.scratch_bytes = scratch.bytes();
    return plan;
}

struct BackwardPlan {
    int dimension_block = 0, chunks = 0;
    int64_t splits = 1, documents_per_split = 0;  // of d(queries)
    int64_t token_tiles = 0;                      // blocks that share a document
    // Byte offsets of scratch arrays, -1 where there is none.
    int64_t kept_lengths = -1, parts = -1, wide = -1;
    int64_t scratch_bytes = 0;
};

// A few query tokens alone would leave the chip idle: into how many parts their documents are split.
inline int64_t document_splits(int64_t warps, int64_t documents, int processors) {
    constexpr int64_t kWarpsPerProcessor = 32, kFewestDocuments = 64;
    int64_t wanted = kWarpsPerProcessor * processors / warps, most = documents / kFewestDocuments;
    int64_t splits = wanted < most ? wanted : most;
    return splits < 1 ? 1 : splits;
}

inline BackwardPlan backward_plan(const Problem& p, const BackwardInput& in, int processors) {
    check_sizes(p);
    BackwardPlan plan;
    plan.dimension_block = gradient_dimension(p.dimension);
    plan.chunks = int(divided_up(p.dimension, plan.dimension_block));
    int64_t rows = p.query_count * p.query_length, documents = p.documents_per_query;
    if (rows == 0 || documents == 0) return plan;
    bool normalized = in.query_scales != nullptr;
    plan.splits = document_splits(rows * plan.chunks, documents, processors);
    plan.documents_per_split = divided_up(divided_up(documents, plan.splits), 32) * 32;
    int tokens = document_gradient_tiles(plan.dimension_block).tokens;
    plan.token_tiles = divided_up(p.document_length, tokens);
    if (p.packed()) {  // the lengths lie on the device: a document of mean length shall have blocks enough
        plan.token_tiles = divided_up(2 * p.packed_tokens, p.document_count() * tokens);
    }
    Scratch scratch;
    if (!in.code.marked && p.document_mask != nullptr) plan.kept_lengths = scratch.add(p.document_count() * 4);
    if (plan.splits > 1 || (plan.chunks > 1 && (normalized || p.query_weights != nullptr))) {
        plan.parts = scratch.add(plan.splits * rows * p.dimension * 4);
    }
    if (plan.chunks > 1 && normalized) plan.wide = scratch.add(document_token_count(p) * p.dimension * 4);
    plan.scratch_bytes = scratch.bytes();
    return plan;
}

}  // namespace jmlr::maxsim
