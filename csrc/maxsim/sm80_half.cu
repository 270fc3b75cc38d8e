#include "sm80.h"
#include "sm80_backward.cuh"
#include "sm80_forward.cuh"

namespace jmlr::maxsim::sm80 {

JMLR_SHARED_LAUNCHES(, tiles::Half)

void forward_half(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    forward_of<tiles::Half>(p, out, scratch, processors, stream);
}

void backward_half(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch, int processors,
                   void* stream) {
    backward_of<tiles::Half>(p, in, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm80
