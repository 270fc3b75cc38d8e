#include "sm90_forward_launch.cuh"

namespace jmlr::maxsim::sm90 {

void forward_bfloat16(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    forward_of<tiles::BFloat16>(p, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm90
