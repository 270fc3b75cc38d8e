#include "sm90_backward.h"

#include "sm90_backward_plan.h"

namespace jmlr::maxsim::sm90 {

int64_t backward_scratch_bytes(const Problem& p, const BackwardInput& in, int processors) {
    return gradient_plan(p, in, true, processors).scratch_bytes;
}

void backward(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch, int processors,
              void* stream) {
    switch (p.type) {
        case Type::float32:
            return backward_float(p, in, out, scratch, processors, stream);
        case Type::float16:
            return backward_half(p, in, out, scratch, processors, stream);
        case Type::bfloat16:
            return backward_bfloat16(p, in, out, scratch, processors, stream);
    }
}

}  // namespace jmlr::maxsim::sm90
