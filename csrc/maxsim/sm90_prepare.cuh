// What the kernels for compute capability 9.0 know of document masks: bits, and the part of each document that counts.
#pragma once

#include "../tiles/launch.h"
#include "rows.cuh"

namespace jmlr::maxsim::sm90 {

// The first kept token of a document and the one after the last; both 0 where none is kept.
struct alignas(8) Extent {
    int begin, end;
};

// Where the bits of a document's mask begin, in words: those of padded documents side by side, those of packed ones
// with room for a word that is not full.
JMLR_BOTH int64_t bits_place(const Problem& p, int64_t number, int64_t first_token) {
    if (p.cu_seqlens == nullptr) return number * tiles::ceil_div<int64_t>(p.document_length, 32);
    return first_token / 32 + number;
}

inline int64_t bits_count(const Problem& p) {
    if (p.cu_seqlens == nullptr) return p.document_count() * tiles::ceil_div<int64_t>(p.document_length, 32);
    return p.packed_tokens / 32 + p.document_count() + 1;
}

// A warp owns a document.
struct MaskBits {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;

    struct Params {
        Problem problem;
        int64_t documents;
        uint32_t* bits;
        Extent* extents;
    };

    static JMLR_DEVICE void run(const Params& params) {
        const Problem& p = params.problem;
        int64_t number = tiles::block_index() * (kThreads / tiles::kWarp) + tiles::warp();
        if (number >= params.documents) return;
        int64_t query = p.candidates ? number / p.documents_per_query : 0;
        int64_t document = number - query * p.documents_per_query;
        Text<uint8_t> text = text_of<uint8_t>(p, query, document);
        const uint8_t* mask = document_mask_of(p, query, document, text.place);
        uint32_t* bits = params.bits + bits_place(p, number, text.place);
        int begin = text.length, end = 0;  // of the lane's own tokens
        for (int first = 0; first < text.length; first += tiles::kWarp) {
            int position = first + tiles::lane();
            bool counts = position < text.length && tiles::load(mask + position * p.document_mask_token_stride) != 0;
            if (counts) begin = tiles::smaller(begin, position), end = position + 1;
            uint32_t votes = tiles::ballot(counts);
            if (tiles::lane() == 0) tiles::store(bits + first / tiles::kWarp, votes);
        }
        JMLR_UNROLL
        for (int other = 1; other < tiles::kWarp; other *= 2) {
            begin = tiles::smaller(begin, tiles::shuffle_xor(begin, other));
            end = tiles::larger(end, tiles::shuffle_xor(end, other));
        }
        if (tiles::lane() == 0) tiles::store(params.extents + number, Extent{end == 0 ? 0 : begin, end});
    }
};

}  // namespace jmlr::maxsim::sm90
