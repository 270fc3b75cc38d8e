// From a problem to the two launches, for one type of elements.
#pragma once

#include "arguments.h"
#include "sm90.h"
#include "sm90_backward_dkdv.cuh"
#include "sm90_backward_dq.cuh"

namespace jmlr::shifted_attention::sm90 {

// Boxes of `queries` and `keys` rows.
template <class Element>
BackwardMaps<Element> backward_maps(const BackwardProblem& problem, int queries, int keys) {
    int64_t heads = problem.heads, kv_heads = problem.kv_heads;
    auto map = [&](const Input& input, int64_t heads, int rows) {
        return map_of<Element>(input, problem, heads, rows);
    };
    auto gradient = [&](const void* data, int64_t heads) {
        return map(contiguous_input(data, problem, heads), heads, kOwned);
    };
    auto rows = [&](const Input& input, int64_t heads) { return rows_of<Element>(input, problem, heads); };
    auto gradient_rows = [&](void* data, int64_t heads) {
        return contiguous_rows(static_cast<Element*>(data), problem, heads);
    };
    return {map(problem.grad_out, heads, queries),
            map(problem.q, heads, queries),
            map(problem.k, kv_heads, keys),
            map(problem.v, kv_heads, keys),
            gradient(problem.dq, heads),
            gradient(problem.dk, kv_heads),
            gradient(problem.dv, kv_heads),
            0,
            {layout_of(problem), rows(problem.grad_out, heads), rows(problem.q, heads), rows(problem.k, kv_heads),
             rows(problem.v, kv_heads), contiguous_rows(static_cast<const Element*>(problem.out), problem, heads),
             problem.lse, problem.delta, gradient_rows(problem.dq, heads), gradient_rows(problem.dk, kv_heads),
             gradient_rows(problem.dv, kv_heads), int(problem.head_dim), float(problem.scale),
             float(problem.scale * kLog2E)}};
}

template <class Kernel, class Element>
void launch_persistent(BackwardMaps<Element> params, int64_t items, int processors, void* stream) {
    params.items = items;
    tiles::launch<Kernel>(params, persistent_blocks(items, processors), stream);
}

template <class Element>
void backward_of(const BackwardProblem& problem, int processors, void* stream) {
    auto launch_with = [&](auto block_d) {
        using Dq = BackwardDq<Element, block_d()>;
        using DkDv = BackwardDkDv<Element, block_d()>;
        Layout layout = layout_of(problem);
        launch_persistent<Dq>(backward_maps<Element>(problem, kOwned, Dq::kKeys),
                              blocks_of(layout, problem.heads, Dq::kBlockM), processors, stream);
        launch_persistent<DkDv>(backward_maps<Element>(problem, DkDv::kQueries, kOwned),
                                blocks_of(layout, problem.kv_heads, DkDv::kBlockN), processors, stream);
    };
    switch (block_d_of(problem.head_dim)) {
        case 64:
            return launch_with(std::integral_constant<int, 64>());
        case 96:
            return launch_with(std::integral_constant<int, 96>());
        default:
            return launch_with(std::integral_constant<int, 128>());
    }
}

}  // namespace jmlr::shifted_attention::sm90
