#include "sm90.h"

#include "sm80_common.h"
#include "sm90_plan.h"

namespace jmlr::maxsim::sm90 {

bool serves(const Problem& p, const ForwardOutput& out) {
    constexpr int64_t kMost = INT32_MAX;
    if (p.type == Type::float32 || out.normalize || forward_dimension(p.dimension) == 0) return false;
    if (p.query_count * p.query_length == 0 || p.document_count() == 0 || document_token_count(p) == 0) return false;
    if (p.document_count() > kMost) return false;
    return tiles::can_map(p.documents, document_axes(p, 8), element_size(p.type));
}

int64_t forward_scratch_bytes(const Problem& p, const ForwardOutput& out, int processors) {
    return plan_forward(p, out, processors).scratch_bytes;
}

void forward(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    if (p.type == Type::float16) forward_half(p, out, scratch, processors, stream);
    else forward_bfloat16(p, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm90
