// The forward pass over documents that are stored in some other form than the rows that meet the queries' panels.

#pragma once

#include "cpu_common.h"

namespace jmlr::maxsim::cpu {

// Kept tokens of one document from some token on.
struct StoredTokens {
    const char* first = nullptr;  // token k is stored at first + k * stride,
    int64_t stride = 0;
    const char* const* places = nullptr;  // or at places[k], where excluded tokens lie between
    int64_t number = 0;                   // among all documents' tokens: of token k number + k,
    const int32_t* kept = nullptr;        // or number + kept[k]
    int64_t count = 0;                    // to the document's end

    const char* at(int64_t k) const { return places ? places[k] : first + k * stride; }
    int64_t number_of(int64_t k) const { return number + (kept ? kept[k] : k); }
};

// A prefetch may name any address.
inline void prefetch(uintptr_t first, int64_t bytes) {
    const uintptr_t end = first + static_cast<uintptr_t>(bytes);
    for (uintptr_t at = first; at < end; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(at));
}

// The stored tokens that the next call will ask for, as likely as not: decoding comes in bursts, which memory alone
// cannot feed.
inline void prefetch_next(const StoredTokens& tokens, int64_t k, int64_t count, int64_t bytes) {
    prefetch(reinterpret_cast<uintptr_t>(tokens.at(k)) + static_cast<uintptr_t>(count * tokens.stride), bytes);
}

// Where rows go, in the form that the panels meet.
struct DecodedRows {
    char* first = nullptr;
    int64_t stride = 0;        // bytes
    float* factors = nullptr;  // of the tokens' similarities
    float* scratch = nullptr;  // one row in float32

    char* at(int64_t k) const { return first + k * stride; }
};

// How documents are stored. Each is decoded once for every group of queries, chunk by chunk.
class Decoder {
public:
    virtual ~Decoder() = default;
    // The first `count` of the tokens.
    virtual void decode(const StoredTokens& tokens, int64_t count, const DecodedRows& rows) const = 0;

    int64_t element_bytes = 1;  // the documents' strides count these
    bool has_factors = true;
};

// Half precision, where the products are float32's.
class Widen final : public Decoder {
public:
    explicit Widen(const Problem& problem) : p_(problem), set_(instructions()) {
        element_bytes = 2;
        has_factors = false;
    }

    void decode(const StoredTokens& tokens, int64_t count, const DecodedRows& rows) const override {
        for (int64_t k = 0; k < count; ++k) {
            prefetch_next(tokens, k, count, p_.dimension * element_bytes);
            set_.widen(p_.type, tokens.at(k), p_.dimension, reinterpret_cast<float*>(rows.at(k)));
        }
    }

private:
    const Problem& p_;
    const Instructions& set_;
};

// Queries whose products are those of bfloat16 pairs, as they lie; all others meet rows of float32.
inline bool meets_pairs(const Problem& p) { return p.type == Type::bfloat16 && instructions().maxima_of_pairs; }

// As forward() of cpu.h; without a decoder documents are of the problem's type.
void forward(const Problem& problem, const ForwardOutput& output, const Decoder* decoder, const Threads& threads);

}  // namespace jmlr::maxsim::cpu
