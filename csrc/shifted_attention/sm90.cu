// What the kernels of compute capability 9.0 take.
#include "sm90.h"

#include "sm90_rows.h"
#include "sm90_tiles.h"

namespace jmlr::shifted_attention::sm90 {

bool serves(const Problem& problem) {
    bool sizes = problem.head_dim % 8 == 0 && problem.head_dim <= kWidestHead && problem.rows <= kMostRows;
    return problem.type != Type::float32 && !problem.wrap && sizes && mappable(problem.q, problem, problem.heads) &&
           mappable(problem.k, problem, problem.kv_heads) && mappable(problem.v, problem, problem.kv_heads);
}

bool serves(const BackwardProblem& problem) {
    auto contiguous = [&](const void* data, int64_t heads) {
        return mappable(contiguous_input(data, problem, heads), problem, heads);
    };
    return serves(static_cast<const Problem&>(problem)) && problem.head_dim <= kWidestBackwardHead &&
           mappable(problem.grad_out, problem, problem.heads) && contiguous(problem.out, problem.heads) &&
           contiguous(problem.dq, problem.heads) && contiguous(problem.dk, problem.kv_heads) &&
           contiguous(problem.dv, problem.kv_heads);
}

}  // namespace jmlr::shifted_attention::sm90
