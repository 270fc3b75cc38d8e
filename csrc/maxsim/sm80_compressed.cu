#include "sm80_compressed.h"

#include "plan.h"

namespace jmlr::maxsim::sm80 {

int64_t compressed_scratch_bytes(const Problem& p, int processors) {
    return forward_plan(p, ForwardOutput{}, processors, compressed_tiles).scratch_bytes;
}

void quantized_forward(const Problem& p, const QuantizedDocuments& documents, float* scores, void* scratch,
                       int processors, void* stream) {
    switch (p.type) {
        case Type::float32:
            return quantized_forward_float(p, documents, scores, scratch, processors, stream);
        case Type::float16:
            return quantized_forward_half(p, documents, scores, scratch, processors, stream);
        case Type::bfloat16:
            return quantized_forward_bfloat16(p, documents, scores, scratch, processors, stream);
    }
}

void residual_forward(const Problem& p, const ResidualDocuments& documents, float* scores, void* scratch,
                      int processors, void* stream) {
    switch (p.type) {
        case Type::float32:
            return residual_forward_float(p, documents, scores, scratch, processors, stream);
        case Type::float16:
            return residual_forward_half(p, documents, scores, scratch, processors, stream);
        case Type::bfloat16:
            return residual_forward_bfloat16(p, documents, scores, scratch, processors, stream);
    }
}

}  // namespace jmlr::maxsim::sm80
