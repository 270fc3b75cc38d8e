#include "sm90_forward_launch.cuh"

namespace jmlr::maxsim::sm90 {

void forward_half(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    forward_of<tiles::Half>(p, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm90
