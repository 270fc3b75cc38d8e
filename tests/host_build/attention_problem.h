// Problems of shifted sparse attention from torch tensors.
#pragma once

#include "../../csrc/shifted_attention/problem.h"
#include "tensor_argument.h"

namespace host_build {

using jmlr::shifted_attention::Input;
using jmlr::shifted_attention::Problem;
using jmlr::shifted_attention::Type;

inline Input input_of(const TensorArgument& x) {
    if (x.sizes.size() == 3) return {x.data, 0, x.strides[0], x.strides[1]};
    return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}

inline Problem problem_of(const TensorArgument& q, const TensorArgument& k, const TensorArgument& v, int64_t group_size,
                          const TensorArgument& cu_seqlens, const TensorArgument& seq_lens, bool wrap, double scale) {
    bool packed = q.sizes.size() == 3;
    Problem problem{};
    problem.type = q.dtype == "float32" ? Type::float32 : q.dtype == "float16" ? Type::float16 : Type::bfloat16;
    problem.batches = packed ? 1 : q.sizes[0];
    problem.rows = q.sizes[packed ? 0 : 1];
    problem.heads = q.sizes[packed ? 1 : 2];
    problem.kv_heads = k.sizes[packed ? 1 : 2];
    problem.head_dim = q.sizes.back();
    problem.group_size = group_size;
    problem.documents = packed ? cu_seqlens.sizes[0] - 1 : 0;
    problem.cu_seqlens = cu_seqlens.as<const int32_t>();
    problem.seq_lens = seq_lens.as<const int32_t>();
    problem.wrap = wrap;
    problem.scale = scale;
    problem.q = input_of(q), problem.k = input_of(k), problem.v = input_of(v);
    return problem;
}

}  // namespace host_build
