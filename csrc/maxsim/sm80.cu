#include "sm80.h"

#include "../tiles/launch.h"
#include "plan.h"

namespace jmlr::maxsim::sm80 {

int multiprocessors() {
#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
    int device = 0, count = 0;
    tiles::check_cuda(cudaGetDevice(&device), "the current device");
    tiles::check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "a device's multiprocessors");
    return count;
#else
    return 1;
#endif
}

int64_t forward_scratch_bytes(const Problem& p, const ForwardOutput& out, int processors) {
    return forward_plan(p, out, processors).scratch_bytes;
}

void forward(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    switch (p.type) {
        case Type::float32: return forward_float(p, out, scratch, processors, stream);
        case Type::float16: return forward_half(p, out, scratch, processors, stream);
        case Type::bfloat16: return forward_bfloat16(p, out, scratch, processors, stream);
    }
}

}  // namespace jmlr::maxsim::sm80
