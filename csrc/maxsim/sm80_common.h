// What the launches of both passes share.
#pragma once

#include <initializer_list>

#include "plan.h"

namespace jmlr::maxsim::sm80 {

inline bool multiples(int64_t unit, std::initializer_list<int64_t> strides) {
    for (int64_t stride : strides) {
        if (stride % unit != 0) return false;
    }
    return true;
}

// Whether every row starts at a multiple of `bytes`.
template <class Element>
bool rows_aligned(const void* first, std::initializer_list<int64_t> strides, int bytes) {
    return reinterpret_cast<uintptr_t>(first) % uintptr_t(bytes) == 0 &&
           multiples(bytes / int(sizeof(Element)), strides);
}

template <class Element>
bool queries_aligned(const Problem& p, int bytes) {
    return rows_aligned<Element>(p.queries, {p.query_stride, p.query_token_stride}, bytes);
}

template <class Element>
bool documents_aligned(const Problem& p, int bytes) {
    return rows_aligned<Element>(p.documents, {p.document_query_stride, p.document_stride, p.document_token_stride},
                                 bytes);
}

template <class T>
T* scratch_array(void* scratch, int64_t at) {
    return at < 0 ? nullptr : reinterpret_cast<T*>(static_cast<char*>(scratch) + at);
}

// Launches that no element type matters to, compiled once (sm80.cu).
void find_kept_tokens(const Problem&, int32_t* kept, int32_t* lengths, void* stream);
void sum_parts(const float* parts, float* sums, int64_t part_count, int64_t count, void* stream);
void zero(void* out, int64_t count, int element_size, void* stream);
void zero_uncovered(const Problem&, void* out, int element_size, void* stream);

}  // namespace jmlr::maxsim::sm80
