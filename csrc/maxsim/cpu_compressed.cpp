// MaxSim against int8, float8 and residual codes: how their tokens are decoded. The rest is the ordinary forward pass.

#include <algorithm>
#include <limits>

#include "cpu_forward.h"

namespace jmlr::maxsim::cpu {
namespace {

// Scales multiply similarities, so that the values, which every type of queries holds exactly, are all there is.
class QuantizedDecoder final : public Decoder {
public:
    QuantizedDecoder(const Problem& problem, const QuantizedDocuments& documents)
        : dimension_(problem.dimension), type_(documents.type), set_(instructions()) {
        scales = documents.scales;
    }

    void decode(const StoredTokens& tokens, int64_t k, float* row) const override {
        set_.decode_values(type_, tokens.at(k), dimension_, row);
    }

private:
    int64_t dimension_;
    ValueType type_;
    const Instructions& set_;
};

class ResidualDecoder final : public Decoder {
public:
    ResidualDecoder(const Problem& problem, const ResidualDocuments& documents)
        : dimension_(problem.dimension), documents_(documents), weights_(field_table), set_(instructions()) {
        exact = false;
        const int64_t fields = int64_t{1} << documents.bits;
        for (int64_t i = 0; i < field_table; ++i) weights_[i] = documents.field_weights[i % fields];
    }

    void decode(const StoredTokens& tokens, int64_t k, float* row) const override {
        // Centroids lie anywhere in their table: asked for well before they are needed.
        if (k + ahead < tokens.count) prefetch(centroid_of(tokens, k + ahead));
        const char* centroid = centroid_of(tokens, k);
        if (centroid == nullptr) {
            std::fill_n(row, dimension_, std::numeric_limits<float>::quiet_NaN());
            return;
        }
        set_.decode_residual({documents_.centroid_type, centroid, documents_.bits, tokens.at(k), weights_.get(),
                              dimension_, documents_.normalize},
                             row);
    }

private:
    static constexpr int64_t ahead = 8;
    static constexpr int64_t cache_line = 64;

    // Null for a code that names none.
    const char* centroid_of(const StoredTokens& tokens, int64_t k) const {
        const int64_t code = documents_.codes[tokens.number_of(k)];
        if (code < 0 || code >= documents_.centroid_count) return nullptr;
        return static_cast<const char*>(documents_.centroids) +
               code * documents_.centroid_stride * element_bytes_of_centroids();
    }

    int64_t element_bytes_of_centroids() const { return cpu::element_bytes(documents_.centroid_type); }

    void prefetch(const char* centroid) const {
        const int64_t bytes = centroid ? dimension_ * element_bytes_of_centroids() : 0;
        for (int64_t at = 0; at < bytes; at += cache_line) __builtin_prefetch(centroid + at);
    }

    int64_t dimension_;
    const ResidualDocuments& documents_;
    Scratch<float> weights_;
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
