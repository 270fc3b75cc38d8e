#include "sm80.h"

#include "prepare.cuh"
#include "sm80_common.h"

namespace jmlr::maxsim::sm80 {

void find_kept_tokens(const Problem& p, int32_t* kept, int32_t* lengths, void* stream) {
    constexpr int kPerBlock = KeptTokens::kThreads / tiles::kWarp;
    tiles::launch<KeptTokens>({p, p.document_count(), kept, lengths}, divided_up(p.document_count(), kPerBlock),
                              stream);
}

void sum_parts(const float* parts, float* sums, int64_t part_count, int64_t count, void* stream) {
    tiles::launch<SumParts>({parts, sums, part_count, count}, divided_up(count, SumParts::kThreads), stream);
}

template <class Out>
static void launch_zeros(typename Zeros<Out>::Params params, void* stream) {
    constexpr int64_t kMostBlocks = 1024;
    int64_t blocks = divided_up(params.count, Zeros<Out>::kThreads);
    tiles::launch<Zeros<Out>>(params, blocks < kMostBlocks ? blocks : kMostBlocks, stream);
}

void zero(void* out, int64_t count, int element_size, void* stream) {
    if (element_size == 2) launch_zeros<uint16_t>({static_cast<uint16_t*>(out), count, nullptr, 0, 0}, stream);
    else launch_zeros<uint32_t>({static_cast<uint32_t*>(out), count, nullptr, 0, 0}, stream);
}

void zero_uncovered(const Problem& p, void* out, int element_size, void* stream) {
    int64_t count = p.packed_tokens * p.dimension, documents = p.document_count();
    if (element_size == 2) {
        launch_zeros<uint16_t>({static_cast<uint16_t*>(out), count, p.cu_seqlens, documents, p.dimension}, stream);
    } else {
        launch_zeros<uint32_t>({static_cast<uint32_t*>(out), count, p.cu_seqlens, documents, p.dimension}, stream);
    }
}

int64_t forward_scratch_bytes(const Problem& p, const ForwardOutput& out, int processors) {
    return forward_plan(p, out, processors).scratch_bytes;
}

void forward(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    switch (p.type) {
        case Type::float32:
            return forward_float(p, out, scratch, processors, stream);
        case Type::float16:
            return forward_half(p, out, scratch, processors, stream);
        case Type::bfloat16:
            return forward_bfloat16(p, out, scratch, processors, stream);
    }
}

int64_t backward_scratch_bytes(const Problem& p, const BackwardInput& in, int processors) {
    return backward_plan(p, in, processors).scratch_bytes;
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

}  // namespace jmlr::maxsim::sm80
