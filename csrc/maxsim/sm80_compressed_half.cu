#include "sm80_compressed.cuh"

namespace jmlr::maxsim::sm80 {

void quantized_forward_half(const Problem& p, const QuantizedDocuments& documents, float* scores, void* scratch,
                            int processors, void* stream) {
    quantized_forward_of<tiles::Half>(p, documents, scores, scratch, processors, stream);
}

void residual_forward_half(const Problem& p, const ResidualDocuments& documents, float* scores, void* scratch,
                           int processors, void* stream) {
    residual_forward_of<tiles::Half>(p, documents, scores, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm80
