// What both directions of the CPU path share: where a document lies, tasks for threads, aligned scratch memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu.h"
#include "cpu_instructions.h"

namespace jmlr::maxsim::cpu {

inline int64_t element_bytes(Type type) { return type == Type::float32 ? 4 : 2; }

inline const char* query_row(const Problem& p, int64_t i, int64_t r) {
    return static_cast<const char*>(p.queries) +
           (i * p.query_stride + r * p.query_token_stride) * element_bytes(p.type);
}

inline float query_weight(const Problem& p, int64_t i, int64_t r) {
    return p.query_weights ? p.query_weights[i * p.query_weights_stride + r * p.query_weights_token_stride] : 1.0f;
}

// exp(x / temperature) = 2**(x * exponent_scale).
inline float exponent_scale_of(float temperature) {
    return static_cast<float>(1.4426950408889634 / static_cast<double>(temperature));
}

// Document j of query i, of elements of `bytes` bytes; all strides in bytes.
struct Document {
    const char* tokens = nullptr;
    int64_t token_bytes = 0;
    int64_t length = 0;
    const uint8_t* mask = nullptr;
    int64_t mask_stride = 0;
    int64_t first_token = 0;  // among all documents' tokens, contiguous

    bool keeps(int64_t t) const { return mask == nullptr || mask[t * mask_stride] != 0; }
    const char* token(int64_t t) const { return tokens + t * token_bytes; }
};

inline Document document_at(const Problem& p, int64_t i, int64_t j, int64_t bytes) {
    const int64_t owner = p.candidates ? i : 0;
    const int64_t n = owner * p.documents_per_query + j;
    Document found;
    found.token_bytes = p.document_token_stride * bytes;
    found.mask_stride = p.document_mask_token_stride;
    const auto base = static_cast<const char*>(p.documents);
    if (p.packed()) {
        found.first_token = p.cu_seqlens[n];
        found.length = p.cu_seqlens[n + 1] - found.first_token;
        found.tokens = base + found.first_token * found.token_bytes;
        if (p.document_mask) found.mask = p.document_mask + found.first_token * found.mask_stride;
    } else {
        found.first_token = n * p.document_length;
        found.length = p.document_length;
        found.tokens = base + (owner * p.document_query_stride + j * p.document_stride) * bytes;
        if (p.document_mask) {
            found.mask = p.document_mask + owner * p.document_mask_query_stride + j * p.document_mask_stride;
        }
    }
    return found;
}

inline Document document_at(const Problem& p, int64_t i, int64_t j) {
    return document_at(p, i, j, element_bytes(p.type));
}

// Winners of a longer document may not fit their integer: its scores are NaN, and it has no winners.
inline bool is_too_long(const Problem& p, int64_t length) {
    return p.packed() && p.max_length > 0 && length > p.max_length;
}

// The longest document that is scored, in tokens.
inline int64_t longest_document(const Problem& p) {
    if (!p.packed()) return p.document_length;
    int64_t longest = 0;
    for (int64_t n = 0; n < p.document_count(); ++n) {
        const int64_t length = int64_t{p.cu_seqlens[n + 1]} - p.cu_seqlens[n];
        if (length > longest && !is_too_long(p, length)) longest = length;
    }
    return longest;
}

inline void check_offsets(const Problem& p) {
    if (!p.packed()) return;
    const int64_t count = p.document_count();
    bool fits = p.cu_seqlens[0] >= 0 && p.cu_seqlens[count] <= p.packed_tokens;
    for (int64_t n = 0; n < count; ++n) fits = fits && p.cu_seqlens[n] <= p.cu_seqlens[n + 1];
    if (!fits) throw std::runtime_error("cu_seqlens must rise within 0 and the documents' number of tokens");
}

// Gradients of packed tokens before the first document and behind the last.
inline void clear_tokens_of_no_document(const Problem& p, void* gradients) {
    if (!p.packed()) return;
    const int64_t first = p.cu_seqlens[0], last = p.cu_seqlens[p.document_count()];
    const int64_t row = p.dimension * element_bytes(p.type);
    std::memset(gradients, 0, first * row);
    std::memset(static_cast<char*>(gradients) + last * row, 0, (p.packed_tokens - last) * row);
}

inline void write_zero_gradients(const Problem& p, const BackwardOutput& output) {
    const int64_t row = p.dimension * element_bytes(p.type), query_tokens = p.query_count * p.query_length;
    const int64_t tokens = p.packed() ? p.packed_tokens : p.document_count() * p.document_length;
    std::memset(output.grad_queries, 0, query_tokens * row);
    std::memset(output.grad_documents, 0, tokens * row);
    if (output.grad_weights) std::fill_n(output.grad_weights, query_tokens, 0.0f);
}

// Tasks in any order on as many threads as are worth it; each thread asks for the next task when it is done, so that
// one long document keeps nobody waiting. `function(worker, task)`: scratch memory belongs to a worker.
class Tasks {
public:
    // `work`: multiplications in all. Below `small`, waking another thread costs more than it saves.
    Tasks(const Threads& threads, int64_t count, int64_t work) : threads_(threads), count_(count) {
        constexpr int64_t small = int64_t{1} << 19;
        const int64_t worth = work / small + 1;
        workers = threads.count < worth ? threads.count : worth;
        if (workers > count) workers = count;
        if (workers < 1) workers = 1;
    }

    template <class Function>
    void run(const Function& function) const {
        std::atomic<int64_t> next{0};
        const auto work = [&](int64_t worker) {
            for (int64_t task = next++; task < count_; task = next++) function(worker, task);
        };
        if (workers == 1) {
            work(0);
        } else {
            threads_.run(workers, work);
        }
    }

    int64_t workers = 1;

private:
    const Threads& threads_;
    int64_t count_;
};

// Uninitialised memory for `count` elements of a trivial type, aligned to a cache line.
template <class Element>
class Scratch {
public:
    explicit Scratch(int64_t count = 0) {
        if (count <= 0) return;
        const size_t bytes = (static_cast<size_t>(count) * sizeof(Element) + 63) / 64 * 64;
        memory_.reset(static_cast<Element*>(std::aligned_alloc(64, bytes)));
        if (memory_ == nullptr) throw std::bad_alloc();
    }
    Element* get() const { return memory_.get(); }
    Element& operator[](int64_t i) const { return memory_.get()[i]; }

private:
    struct Free {
        void operator()(Element* memory) const { std::free(memory); }
    };
    std::unique_ptr<Element, Free> memory_;
};

}  // namespace jmlr::maxsim::cpu
