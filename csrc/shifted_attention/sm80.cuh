// From a problem to launches, for one type of elements.
#pragma once

#include "arguments.h"
#include "backward_dkdv.cuh"
#include "backward_dq.cuh"
#include "forward.cuh"
#include "sm80.h"

namespace jmlr::shifted_attention::sm80 {

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
