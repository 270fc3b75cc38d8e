#include "sm90_backward.cuh"
#include "sm90_backward.h"

namespace jmlr::maxsim {

namespace sm80 {
JMLR_SHARED_LAUNCHES(extern, tiles::Half)
}

namespace sm90 {

void backward_half(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch, int processors,
                   void* stream) {
    backward_of<tiles::Half>(p, in, out, scratch, processors, stream);
}

}  // namespace sm90
}  // namespace jmlr::maxsim
