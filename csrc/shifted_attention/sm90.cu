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

}  // namespace jmlr::shifted_attention::sm90
