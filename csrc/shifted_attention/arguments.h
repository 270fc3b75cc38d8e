// What the host hands to kernels, made of a problem.
#pragma once

#include <stdexcept>

#include "head_rows.h"
#include "problem.h"

namespace jmlr::shifted_attention {

constexpr double kLog2E = 1.4426950408889634;

inline Layout layout_of(const Problem& problem) {
    if (problem.rows > kMostRows)
        throw std::runtime_error("shifted attention takes at most 2**29 tokens per row: split the batch");
    Layout layout;
    layout.cu_seqlens = problem.cu_seqlens;
    layout.seq_lens = problem.seq_lens;
    layout.documents = int(problem.documents);
    layout.batches = int(problem.batches);
    layout.rows = int(problem.rows);
    layout.heads = int(problem.heads);
    layout.ratio = int(problem.heads / problem.kv_heads);
    layout.group_size = int(smaller(problem.group_size, 2 * problem.rows));
    layout.half_group = problem.group_size / 2;
    layout.wrap = problem.wrap;
    return layout;
}

template <class Element>
Rows<const Element> rows_of(const Input& input, const Problem& problem, int64_t heads) {
    auto aligned = [](int64_t count, int64_t stride) {
        return count == 1 || stride * int64_t(sizeof(Element)) % 16 == 0;
    };
    bool whole = reinterpret_cast<uintptr_t>(input.data) % 16 == 0 && aligned(problem.batches, input.batch_stride) &&
                 aligned(problem.rows, input.token_stride) && aligned(heads, input.head_stride);
    return {static_cast<const Element*>(input.data), input.batch_stride, input.token_stride, input.head_stride, whole};
}

// A contiguous tensor.
template <class Element>
Rows<Element> contiguous_rows(Element* data, const Problem& problem, int64_t heads) {
    bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && problem.head_dim * int64_t(sizeof(Element)) % 16 == 0;
    return {data, problem.rows * heads * problem.head_dim, heads * problem.head_dim, problem.head_dim, whole};
}

}  // namespace jmlr::shifted_attention
