// Compressed documents as plain pointers and sizes: what the CPU and the CUDA implementations both take.
//
// Problem (problem.h) holds everything else: its `type` is that of the queries alone, its `documents` are what is
// stored for each token, one byte an element, so that its document strides count bytes. What is stored beside those
// bytes, once for each token, is contiguous in the documents' shape less its last dimension: that of padded token t is
// at n * document_length + t, where n counts documents over all queries; that of a packed one at cu_seqlens[n] + t.
//
// There are scores only, contiguous float32 [Nq, N]. Semantics: jmlr_kernels/maxsim/quantized.py, residual.py and
// docs/maxsim-compressed.md.

#pragma once

#include <cstdint>

#include "problem.h"

namespace jmlr::maxsim {

enum class ValueType { int8, float8_e4m3fn };

// Problem::dimension values a token. The similarity's float32 sum is multiplied by the scale.
struct QuantizedDocuments {
    ValueType type = ValueType::int8;
    const float* scales = nullptr;
};

// A token is a centroid plus, for each element, the weight that its bit field of the residual names: element e is field
// e % (8 / bits) of byte e // (8 / bits), the first field in the highest bits. With `normalize` it has unit length, and
// for queries of 16 bits it is rounded to their type. A code that is no centroid's number makes its token NaN.
struct ResidualDocuments {
    int bits = 0;  // of a field: 1, 2, 4 or 8. A token has dimension * bits / 8 bytes
    bool normalize = false;
    const int32_t* codes = nullptr;
    const void* centroids = nullptr;  // [count, D], unit stride along D
    Type centroid_type = Type::float32;
    int64_t centroid_count = 0;
    int64_t centroid_stride = 0;
    const float* field_weights = nullptr;  // [2**bits], by the field as it is stored
};

}  // namespace jmlr::maxsim
