// One MaxSim problem as plain pointers, sizes and strides: what the CPU and the CUDA implementations both take.
//
// Nothing here knows of torch; torch_cpu.cpp and torch_cuda.cpp translate tensors to these structs, after they have
// checked shapes, dtypes and offsets. Strides count elements, in 64 bits; the embedding dimension always has stride 1.
// Semantics: kernels' docstrings in jmlr_kernels/maxsim/function.py; derivation of the gradients:
// docs/maxsim-backward.md.

#pragma once

#include <cstdint>

namespace jmlr::maxsim {

enum class Type { float32, float16, bfloat16 };

// The integer that a winner's position is saved in (jmlr_kernels/maxsim/layout.py).
enum class WinnerType { uint8, uint16, int32 };

// Where d(loss)/d(score) comes from (jmlr_kernels/maxsim/gradient_rule.py).
enum class Rule { scores, tokens, labels, teacher, margins };

struct Problem {
    Type type = Type::float32;  // of queries and documents
    int64_t query_count = 0;
    int64_t query_length = 0;
    int64_t dimension = 0;
    int64_t documents_per_query = 0;  // all documents, or with `candidates` the K of each query
    int64_t document_length = 0;      // 0 for packed documents
    int64_t packed_tokens = 0;        // rows of `documents` when they are packed; the offsets may end earlier
    int64_t max_length = 0;           // packed: a longer document's scores are NaN; 0: no bound
    bool candidates = false;          // every query has its own documents

    const void* queries = nullptr;  // [Nq, Lq, D]
    int64_t query_stride = 0;
    int64_t query_token_stride = 0;

    // Padded [Nd, Ld, D] or [Nq, K, Ld, D]: token t of document j of query i is at
    // i * document_query_stride + j * document_stride + t * document_token_stride; the first is 0 unless `candidates`.
    // Packed [T, D]: token t of document n is at (cu_seqlens[n] + t) * document_token_stride, where n is j, or
    // i * documents_per_query + j for candidates.
    const void* documents = nullptr;
    int64_t document_query_stride = 0;
    int64_t document_stride = 0;
    int64_t document_token_stride = 0;
    const int32_t* cu_seqlens = nullptr;  // null: padded; else contiguous, one more than documents in all

    // Bytes that are 0 or 1; 1 counts. Null: every token counts. The document mask's strides are the documents' roles.
    const uint8_t* query_mask = nullptr;
    int64_t query_mask_stride = 0;
    int64_t query_mask_token_stride = 0;
    const uint8_t* document_mask = nullptr;
    int64_t document_mask_query_stride = 0;
    int64_t document_mask_stride = 0;
    int64_t document_mask_token_stride = 0;

    const float* query_weights = nullptr;  // null: all 1
    int64_t query_weights_stride = 0;
    int64_t query_weights_token_stride = 0;

    bool packed() const { return cu_seqlens != nullptr; }
    int64_t document_count() const { return candidates ? query_count * documents_per_query : documents_per_query; }
};

// How winners are saved. `none` says that nobody won; unless `marked`, every value is a position (documents of exactly
// 256 or 65,536 tokens), and who has no winner follows from the masks alone.
struct WinnerCode {
    WinnerType type = WinnerType::int32;
    int32_t none = -1;
    bool marked = true;
};

// All outputs are contiguous. Null: not asked for.
struct ForwardOutput {
    float* scores = nullptr;  // [Nq, N]; [Nq, N, Lq] with `per_token`
    bool per_token = false;   // the maxima themselves, times their weights
    void* winners = nullptr;  // [Nq, N, Lq], positions within the document
    WinnerCode code;
    bool normalize = false;
    float* query_scales = nullptr;     // [Nq, Lq] inverse norms of both sides, where they are normalised
    float* document_scales = nullptr;  // as documents less D
};

// The rule's tensors by role, contiguous float32; null where a rule has none.
struct RuleInput {
    Rule rule = Rule::scores;
    const float* grad = nullptr;          // scores [Nq, N]; tokens [Nq, N, Lq]; else [Nq]
    const float* scores = nullptr;        // [Nq, N]
    const float* row = nullptr;           // [Nq, 2]
    const float* temperatures = nullptr;  // [2]
    const int64_t* labels = nullptr;      // [Nq]
    const float* teacher = nullptr;       // [Nq, N]
    const float* teacher_row = nullptr;   // [Nq, 2]
};

struct BackwardInput {
    RuleInput rule;
    const void* winners = nullptr;  // [Nq, N, Lq], contiguous
    WinnerCode code;
    const float* query_scales = nullptr;  // contiguous, both or neither: the forward normalised
    const float* document_scales = nullptr;
};

// Contiguous, in the inputs' shapes; gradients of queries and documents in their type.
struct BackwardOutput {
    void* grad_queries = nullptr;
    void* grad_documents = nullptr;
    float* grad_weights = nullptr;  // [Nq, Lq]; null without weights
};

}  // namespace jmlr::maxsim
