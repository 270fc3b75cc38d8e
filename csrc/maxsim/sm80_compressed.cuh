// Launches of the forward pass against compressed documents for one element type of the queries.
#pragma once

#include "compressed_tokens.cuh"
#include "sm80_compressed.h"
#include "sm80_forward.cuh"

namespace jmlr::maxsim::sm80 {

inline ForwardOutput scores_alone(float* scores) {
    ForwardOutput out;
    out.scores = scores;
    return out;
}

template <class Element>
void quantized_forward_of(const Problem& p, const QuantizedDocuments& documents, float* scores, void* scratch,
                          int processors, void* stream) {
    score<Element, QuantizedTokens>(p, scores_alone(scores), {documents}, scratch, processors, stream);
}

template <class Element>
void residual_forward_of(const Problem& p, const ResidualDocuments& documents, float* scores, void* scratch,
                         int processors, void* stream) {
    int unit = element_size(documents.centroid_type);
    bool whole_residuals = p.dimension % 8 == 0 && documents_aligned<uint8_t>(p, documents.bits);
    bool whole_centroids = unit == 2 ? rows_aligned<uint16_t>(documents.centroids, {documents.centroid_stride}, 16)
                                     : rows_aligned<float>(documents.centroids, {documents.centroid_stride}, 16);
    score<Element, ResidualTokens>(p, scores_alone(scores), {documents, whole_residuals, whole_centroids}, scratch,
                                   processors, stream);
}

}  // namespace jmlr::maxsim::sm80
