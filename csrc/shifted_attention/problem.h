// What an operation is asked to do: pointers, sizes, strides. Every path of the library takes these plain structs.
//
// jmlr_kernels/shifted_attention/reference.py is the definition; docs/shifted-attention-backward.md derives the
// kernels.
#pragma once

#include <cstdint>

namespace jmlr::shifted_attention {

enum class Type { float16, bfloat16, float32 };

// Rows of head_dim neighbouring elements; strides in elements.
struct Input {
    const void* data;
    int64_t batch_stride, token_stride, head_stride;
};

struct Problem {
    Type type;
    int64_t batches;  // 1 for packed documents
    int64_t rows;     // tokens of a batch row, with its padding
    int64_t heads, kv_heads, head_dim;
    int64_t group_size;
    int64_t documents;          // of a packed batch
    const int32_t* cu_seqlens;  // [documents + 1], or nullptr: then every batch row is a document
    const int32_t* seq_lens;    // [batches]: tokens before right padding; or nullptr
    bool wrap;
    double scale;
    Input q, k, v;
};

// Outputs are contiguous: out [batches, rows, heads, head_dim] in `type`; lse [batches, heads, rows], the natural
// logarithm of the sums of exponentials, +inf for padding.
struct ForwardProblem : Problem {
    void* out;
    float* lse;
};

// `out` and `lse` are those of the forward pass, contiguous. `delta` is memory for as many numbers as lse has.
struct BackwardProblem : Problem {
    Input grad_out;
    const void* out;
    const float* lse;
    float* delta;
    void *dq, *dk, *dv;
};

}  // namespace jmlr::shifted_attention
