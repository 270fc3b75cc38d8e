// MaxSim against int8, float8 and residual codes: how their tokens are decoded. The rest is the ordinary forward pass.

#include <cstring>

#include "cpu_forward.h"

namespace jmlr::maxsim::cpu {
namespace {

// Scales multiply similarities: the values alone are exact in every type of queries.
class QuantizedDecoder final : public Decoder {
public:
    QuantizedDecoder(const Problem& problem, const QuantizedDocuments& documents)
        : dimension_(problem.dimension),
          row_(meets_pairs(problem) ? Row::bfloat16 : Row::float32),
          documents_(documents),
          set_(instructions()) {}

    void decode(const StoredTokens& tokens, int64_t count, const DecodedRows& rows) const override {
        for (int64_t k = 0; k < count; ++k) {
            prefetch_next(tokens, k, count, dimension_);
            set_.decode_values(documents_.type, tokens.at(k), dimension_, row_, rows.at(k));
            rows.factors[k] = documents_.scales[tokens.number_of(k)];
        }
    }

private:
    int64_t dimension_;
    Row row_;
    const QuantizedDocuments& documents_;
    const Instructions& set_;
};

class ResidualDecoder final : public Decoder {
public:
    ResidualDecoder(const Problem& problem, const ResidualDocuments& documents)
        : documents_(documents), weights_(field_table), set_(instructions()) {
        const int64_t fields = int64_t{1} << documents.bits;
        for (int64_t i = 0; i < field_table; ++i) weights_[i] = documents.field_weights[i % fields];
        format_.centroid_type = documents.centroid_type;
        format_.bits = documents.bits;
        format_.normalize = documents.normalize;
        format_.dimension = problem.dimension;
        format_.weights = weights_.get();
        format_.row = meets_pairs(problem)             ? Row::bfloat16
                      : problem.type == Type::float16  ? Row::rounded_to_float16
                      : problem.type == Type::bfloat16 ? Row::rounded_to_bfloat16
                                                       : Row::float32;
    }

    void decode(const StoredTokens& tokens, int64_t count, const DecodedRows& rows) const override {
        const int64_t bytes = format_.dimension * format_.bits / 8;
        const int64_t centroid_bytes = format_.dimension * cpu::element_bytes(format_.centroid_type);
        for (int64_t k = 0; k < count; ++k) {
            prefetch_next(tokens, k, count, bytes);
            if (k + ahead < tokens.count) {  // centroids lie anywhere in their table
                const char* later = centroid_of(tokens.number_of(k + ahead));
                if (later) prefetch(reinterpret_cast<uintptr_t>(later), centroid_bytes);
            }
            const char* centroid = centroid_of(tokens.number_of(k));
            rows.factors[k] = 1.0f;
            if (centroid) {
                rows.factors[k] = set_.decode_residual(format_, centroid, tokens.at(k), rows.scratch, rows.at(k));
            } else {
                std::memset(rows.at(k), 0xff, static_cast<size_t>(rows.stride));  // NaN in every form of a row
            }
        }
    }

private:
    static constexpr int64_t ahead = 12;

    // Null for a code that names none.
    const char* centroid_of(int64_t token) const {
        const int64_t code = documents_.codes[token];
        if (code < 0 || code >= documents_.centroid_count) return nullptr;
        const int64_t place = code * documents_.centroid_stride;
        return static_cast<const char*>(documents_.centroids) + place * cpu::element_bytes(format_.centroid_type);
    }

    const ResidualDocuments& documents_;
    Scratch<float> weights_;
    ResidualFormat format_;
    const Instructions& set_;
};

ForwardOutput only(float* scores) {
    ForwardOutput output;
    output.scores = scores;
    return output;
}

}  // namespace

void quantized_forward(const Problem& problem, const QuantizedDocuments& documents, float* scores,
                       const Threads& threads) {
    const QuantizedDecoder decoder(problem, documents);
    forward(problem, only(scores), &decoder, threads);
}

void residual_forward(const Problem& problem, const ResidualDocuments& documents, float* scores,
                      const Threads& threads) {
    const ResidualDecoder decoder(problem, documents);
    forward(problem, only(scores), &decoder, threads);
}

}  // namespace jmlr::maxsim::cpu
