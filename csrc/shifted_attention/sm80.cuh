// From a problem to launches, for one type of elements.
#pragma once

#include "backward_dkdv.cuh"
#include "backward_dq.cuh"
#include "forward.cuh"
#include "sm80.h"

namespace jmlr::shifted_attention::sm80 {

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

// Calls `body` with the width of a tile that holds head_dim columns, as a constant.
template <class Body>
void with_block_d(int64_t head_dim, Body body) {
    switch (head_dim <= kWidestHead ? block_d_of(head_dim) : 0) {
        case 32:
            return body(std::integral_constant<int, 32>());
        case 64:
            return body(std::integral_constant<int, 64>());
        case 96:
            return body(std::integral_constant<int, 96>());
        case 128:
            return body(std::integral_constant<int, 128>());
        case 256:
            return body(std::integral_constant<int, 256>());
    }
    throw std::runtime_error("shifted attention takes heads of at most 256 dimensions on this path, not " +
                             std::to_string(head_dim));
}

// Launches a kernel of a family, with the tiles that the current device has shared memory for, over `heads` heads.
template <template <class, int, SharedMemory> class Family, Kernel kKernel, class Element, int kBlockD, class Params>
void launch_on_device(const Params& params, int64_t heads, void* stream) {
    constexpr int kBytes = int(sizeof(Element));
    constexpr SharedMemory kSmall = SharedMemory::small;
    constexpr SharedMemory kMost = compiled_class(kKernel, kBytes, kBlockD, SharedMemory::large);
    auto launch_with = [&](auto shared) {
        using Chosen = Family<Element, kBlockD, shared()>;
        int64_t blocks = blocks_of(params.layout, heads, rows_of_block(kKernel, Chosen::kSizes));
        tiles::launch<Chosen>(params, blocks, stream);
    };
    if (kMost == kSmall || tiles::shared_memory_class() == kSmall) {
        launch_with(std::integral_constant<SharedMemory, kSmall>());
    } else {
        launch_with(std::integral_constant<SharedMemory, kMost>());
    }
}

template <class Element>
void forward_of(const ForwardProblem& problem, void* stream) {
    with_block_d(problem.head_dim, [&](auto block_d) {
        ForwardParams<Element> params{layout_of(problem),
                                      rows_of<Element>(problem.q, problem, problem.heads),
                                      rows_of<Element>(problem.k, problem, problem.kv_heads),
                                      rows_of<Element>(problem.v, problem, problem.kv_heads),
                                      contiguous_rows(static_cast<Element*>(problem.out), problem, problem.heads),
                                      problem.lse,
                                      int(problem.head_dim),
                                      float(problem.scale * kLog2E)};
        launch_on_device<Forward, Kernel::forward, Element, block_d()>(params, problem.heads, stream);
    });
}

template <class Element>
void backward_of(const BackwardProblem& problem, void* stream) {
    with_block_d(problem.head_dim, [&](auto block_d) {
        auto input = [&](const Input& x, int64_t heads) { return rows_of<Element>(x, problem, heads); };
        auto output = [&](void* x, int64_t heads) { return contiguous_rows(static_cast<Element*>(x), problem, heads); };
        BackwardParams<Element> params{
            layout_of(problem),
            input(problem.grad_out, problem.heads),
            input(problem.q, problem.heads),
            input(problem.k, problem.kv_heads),
            input(problem.v, problem.kv_heads),
            contiguous_rows(static_cast<const Element*>(problem.out), problem, problem.heads),
            problem.lse,
            problem.delta,
            output(problem.dq, problem.heads),
            output(problem.dk, problem.kv_heads),
            output(problem.dv, problem.kv_heads),
            int(problem.head_dim),
            float(problem.scale),
            float(problem.scale * kLog2E)};
        launch_on_device<BackwardDq, Kernel::backward_dq, Element, block_d()>(params, problem.heads, stream);
        launch_on_device<BackwardDkDv, Kernel::backward_dkdv, Element, block_d()>(params, problem.kv_heads, stream);
    });
}

}  // namespace jmlr::shifted_attention::sm80
