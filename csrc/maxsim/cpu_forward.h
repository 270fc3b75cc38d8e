// The forward pass over documents that are stored in some other form than the rows that meet the queries' panels.

#pragma once

#include "cpu_common.h"

namespace jmlr::maxsim::cpu {

// Kept tokens of one document, a run of them.
struct StoredTokens {
    const char* first = nullptr;  // token k is stored at first + k * stride,
    int64_t stride = 0;
    const char* const* places = nullptr;  // or at places[k], where excluded tokens lie between
    int64_t number = 0;                   // among all documents' tokens: of token k number + k,
    const int32_t* kept = nullptr;        // or number + kept[k]
    int64_t count = 0;

    const char* at(int64_t k) const { return places ? places[k] : first + k * stride; }
    int64_t number_of(int64_t k) const { return number + (kept ? kept[k] : k); }
};

// How documents are stored. Every document is decoded once for each group of queries, chunk by chunk.
class Decoder {
public:
    virtual ~Decoder() = default;
    // Token k of the run as float32.
    virtual void decode(const StoredTokens& tokens, int64_t k, float* row) const = 0;

    int64_t element_bytes = 1;      // the documents' strides count these
    bool exact = true;              // every value fits the queries' type; else rows are rounded to it
    const float* scales = nullptr;  // null, or a factor for each token's similarities, by its number
};

// As forward() of cpu.h; the decoder is asked in place of the documents' bytes. Without one they are the problem's
// type.
void forward(const Problem& problem, const ForwardOutput& output, const Decoder* decoder, const Threads& threads);

}  // namespace jmlr::maxsim::cpu
