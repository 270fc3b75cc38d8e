// What comes before and after the products: lists of kept tokens, inverse norms, sums over a long query's row tiles,
// zeros.
#pragma once

#include "../tiles/launch.h"
#include "rows.cuh"

namespace jmlr::maxsim {

// The positions of each document's kept tokens, side by side from the document's place on, and how many there are. By
// it excluded tokens cost nothing. A warp owns a document. `kept` null: only counts.
struct KeptTokens {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;

    struct Params {
        Problem problem;
        int64_t documents;
        int32_t* kept;     // [tokens]
        int32_t* lengths;  // [documents]
    };

    static JMLR_DEVICE void run(const Params& params) {
        const Problem& p = params.problem;
        int64_t number = tiles::block_index() * (kThreads / tiles::kWarp) + tiles::warp();
        if (number >= params.documents) return;
        int64_t query = p.candidates ? number / p.documents_per_query : 0;
        int64_t document = number - query * p.documents_per_query;
        Text<uint8_t> text = text_of<uint8_t>(p, query, document);
        const uint8_t* mask = document_mask_of(p, query, document, text.place);
        int found = 0;
        for (int first = 0; first < text.length; first += tiles::kWarp) {
            int position = first + tiles::lane();
            bool counts = position < text.length && tiles::load(mask + position * p.document_mask_token_stride) != 0;
            uint32_t votes = tiles::ballot(counts);
            int before = tiles::count_bits(votes & ((1u << tiles::lane()) - 1));
            if (counts && params.kept != nullptr) tiles::store(params.kept + text.place + found + before, position);
            found += tiles::count_bits(votes);
        }
        if (tiles::lane() == 0) tiles::store(params.lengths + number, found);
    }
};

// 1 / max(|x|, floor) of every token of a list; a warp owns a token.
template <class Element>
struct InverseNorms {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kPerLane = 4;

    struct Params {
        TokenList<Element> tokens;
        int dimension;
        bool whole;
        float* scales;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t token = tiles::block_index() * (kThreads / tiles::kWarp) + tiles::warp();
        if (token >= p.tokens.count()) return;
        const Element* from = p.tokens.row(token);
        float squares = 0.0f;
        for (int first = tiles::lane() * kPerLane; first < p.dimension; first += tiles::kWarp * kPerLane) {
            Slice<kPerLane> slice = load_slice<kPerLane>(from, first, p.dimension, p.whole);
            JMLR_UNROLL
            for (int i = 0; i < kPerLane; ++i) squares += slice.value[i] * slice.value[i];
        }
        squares = warp_sum(squares);
        if (tiles::lane() == 0) tiles::store(p.scales + token, inverse_norm(squares));
    }
};

// The sum of `parts` arrays side by side, in their order.
struct SumParts {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;

    struct Params {
        const float* parts;  // [part_count, count]
        float* sums;
        int64_t part_count, count;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t i = tiles::block_index() * kThreads + tiles::thread_index();
        if (i >= p.count) return;
        float sum = 0.0f;
        for (int64_t part = 0; part < p.part_count; ++part) sum += tiles::load(p.parts + part * p.count + i);
        tiles::store(p.sums + i, sum);
    }
};

// Zeros everywhere, or in the tokens of a packed list that no document covers.
template <class Out>
struct Zeros {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;

    struct Params {
        Out* out;
        int64_t count;
        const int32_t* cu_seqlens;  // null: everything is zero
        int64_t documents, dimension;
    };

    static JMLR_DEVICE void run(const Params& p) {
        int64_t before = p.count, from = p.count;
        if (p.cu_seqlens != nullptr) {
            before = tiles::load(p.cu_seqlens) * p.dimension;
            from = tiles::load(p.cu_seqlens + p.documents) * p.dimension;
        }
        int64_t own = tiles::block_index() * kThreads + tiles::thread_index(), step = tiles::block_count() * kThreads;
        for (int64_t i = own; i < before; i += step) tiles::store(p.out + i, Out{});
        for (int64_t i = from + own; i < p.count; i += step) tiles::store(p.out + i, Out{});
    }
};

}  // namespace jmlr::maxsim
