#include "smooth_sm80.h"

#include "smooth_plan.h"
#include "smooth_weight_gradient.cuh"

namespace jmlr::maxsim::sm80 {

void weight_gradient(const Problem& p, const SmoothBackwardInput& in, float* grad_weights, void* stream) {
    using Kernel = SmoothWeightGradient;
    int64_t blocks = p.query_count * divided_up(p.query_length, tiles::kWarp);
    tiles::launch<Kernel>({in.grad_scores, in.maxima, grad_weights, p.query_length, p.documents_per_query}, blocks,
                          stream);
}

int64_t smooth_forward_scratch_bytes(const Problem& p, int processors) {
    return forward_plan(p, {}, processors, forward_tiles).scratch_bytes;
}

void smooth_forward(const Problem& p, const SmoothForwardOutput& out, void* scratch, int processors, void* stream) {
    switch (p.type) {
        case Type::float32:
            return smooth_forward_float(p, out, scratch, processors, stream);
        case Type::float16:
            return smooth_forward_half(p, out, scratch, processors, stream);
        case Type::bfloat16:
            return smooth_forward_bfloat16(p, out, scratch, processors, stream);
    }
}

int64_t smooth_backward_scratch_bytes(const Problem& p, int processors) {
    return smooth_backward_plan(p, processors).scratch_bytes;
}

void smooth_backward(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out, void* scratch,
                     int processors, void* stream) {
    switch (p.type) {
        case Type::float32:
            return smooth_backward_float(p, in, out, scratch, processors, stream);
        case Type::float16:
            return smooth_backward_half(p, in, out, scratch, processors, stream);
        case Type::bfloat16:
            return smooth_backward_bfloat16(p, in, out, scratch, processors, stream);
    }
}

}  // namespace jmlr::maxsim::sm80
