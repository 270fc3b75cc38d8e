// The CPU path of MaxSim over random problems, for AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is on
// the heap and exactly as large as the problem says, so that one element too far is an error. Threads are plain
// std::thread. Scores, winners and gradients are compared with loops in float64; compressed documents likewise.
//
//     cpu_sanitize [problems] [seed]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "maxsim/cpu.h"
#include "maxsim/problem.h"

using namespace jmlr::maxsim;

namespace {

std::mt19937 generator;

int64_t upto(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
bool coin() { return upto(0, 1) == 1; }

// A vector keeps spare capacity, behind which AddressSanitizer cannot look; an array does not.
template <class Element>
struct Buffer {
    explicit Buffer(int64_t count) : count(count), memory(new Element[std::max<int64_t>(count, 1)]) {}
    Element* get() const { return memory.get(); }
    Element& operator[](int64_t i) const { return memory[i]; }
    int64_t count;
    std::unique_ptr<Element[]> memory;
};

// Small integers: exact in every type, with many ties, and sums that are exact in float32 in any order.
float small_number() { return static_cast<float>(upto(-3, 3)); }

uint16_t two_bytes(Type type, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == Type::bfloat16) return static_cast<uint16_t>(bits >> 16);
    if (value == 0) return 0;
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 | (bits >> 13 & 0x3ff));
}

float as_float(Type type, const void* memory, int64_t i) {
    if (type == Type::float32) return static_cast<const float*>(memory)[i];
    const uint16_t half = static_cast<const uint16_t*>(memory)[i];
    uint32_t bits = uint32_t{half} << 16;
    if (type == Type::float16) {
        if ((half & 0x7fff) == 0) return 0;
        bits = (half & 0x8000u) << 16 | ((half >> 10 & 31) + 112u) << 23 | (half & 0x3ffu) << 13;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Embeddings {
    Embeddings(Type type, int64_t count) : bytes(count * (type == Type::float32 ? 4 : 2)) {
        for (int64_t i = 0; i < count; ++i) {
            const float value = small_number();
            const uint16_t half = two_bytes(type, value);
            if (type == Type::float32) {
                std::memcpy(bytes.get() + i * 4, &value, 4);
            } else {
                std::memcpy(bytes.get() + i * 2, &half, 2);
            }
        }
    }
    Buffer<char> bytes;
};

void fail(const char* what, int64_t problem) {
    std::fprintf(stderr, "problem %lld: wrong %s\n", static_cast<long long>(problem), what);
    std::exit(1);
}

cpu::Threads some_threads(int64_t count) {
    cpu::Threads threads;
    threads.count = count;
    threads.run = [](int64_t count, const std::function<void(int64_t)>& function) {
        std::vector<std::thread> running;
        for (int64_t i = 0; i < count; ++i) running.emplace_back(function, i);
        for (std::thread& one : running) one.join();
    };
    return threads;
}

// Smooth MaxSim of the same problem, twice: the bits do not depend on threads. The Python tests compare the values.
void run_smooth(Problem p, int64_t tokens, int64_t number) {
    const int64_t query_tokens = p.query_count * p.query_length, pairs = p.query_count * p.documents_per_query;
    const int64_t bytes = p.type == Type::float32 ? 4 : 2;
    p.max_length = 0;
    Buffer<float> grad(pairs);
    for (int64_t i = 0; i < pairs; ++i) grad[i] = small_number();
    std::vector<std::vector<char>> results;
    for (const int64_t count : {int64_t{1}, upto(2, 3)}) {
        const cpu::Threads threads = some_threads(count);
        Buffer<float> scores(pairs), maxima(pairs * p.query_length), grad_weights(query_tokens);
        cpu::smooth_forward(p, {0.75f, scores.get(), maxima.get()}, threads);
        Buffer<char> grad_queries(query_tokens * p.dimension * bytes), grad_documents(tokens * p.dimension * bytes);
        Problem without_query_mask = p;
        without_query_mask.query_mask = nullptr;
        cpu::smooth_backward(without_query_mask, {0.75f, grad.get(), maxima.get()},
                             {grad_queries.get(), grad_documents.get(), p.query_weights ? grad_weights.get() : nullptr},
                             threads);
        std::vector<char> all;
        const auto append = [&](const void* from, int64_t size) {
            all.insert(all.end(), static_cast<const char*>(from), static_cast<const char*>(from) + size);
        };
        append(scores.get(), pairs * 4);
        append(maxima.get(), maxima.count * 4);
        append(grad_queries.get(), grad_queries.count);
        append(grad_documents.get(), grad_documents.count);
        if (p.query_weights) append(grad_weights.get(), query_tokens * 4);
        results.push_back(all);
    }
    if (results[0] != results[1]) fail("bits of smooth MaxSim on several threads", number);
}

// A random problem less its documents' memory, and what it points into.
struct Inputs {
    Inputs() {
        p.type = static_cast<Type>(upto(0, 2));
        p.query_count = upto(1, 5);
        p.query_length = upto(1, 40);
        p.dimension = upto(1, 70);
        p.documents_per_query = upto(1, 6);
        p.candidates = coin();
        longest = upto(1, coin() ? 60 : 300);
        const int64_t documents = p.document_count();
        tokens = documents * longest;
        if (coin()) {
            offsets = Buffer<int32_t>(documents + 1);
            offsets[0] = 0;
            for (int64_t n = 0; n < documents; ++n)
                offsets[n + 1] = offsets[n] + static_cast<int32_t>(upto(0, longest));
            tokens = offsets[documents] + upto(0, 3);
            p.cu_seqlens = offsets.get();
            p.packed_tokens = tokens;
        } else {
            p.document_length = longest;
            p.document_mask_stride = longest;
            p.document_mask_query_stride = p.candidates ? p.documents_per_query * longest : 0;
        }
        query_tokens = p.query_count * p.query_length;
        pairs = p.query_count * p.documents_per_query;
        // Rows may be farther apart than they are long; the last one ends the buffer.
        p.query_token_stride = p.dimension + upto(0, 3);
        p.query_stride = p.query_length * p.query_token_stride;
        queries = Embeddings(p.type, (query_tokens - 1) * p.query_token_stride + p.dimension);
        p.queries = queries.bytes.get();
        query_mask = Buffer<uint8_t>(query_tokens);
        document_mask = Buffer<uint8_t>(tokens);
        for (int64_t i = 0; i < query_tokens; ++i) query_mask[i] = upto(0, 3) > 0;
        for (int64_t i = 0; i < tokens; ++i) document_mask[i] = upto(0, 2) > 0;
        if (coin()) p.query_mask = query_mask.get();
        p.query_mask_stride = p.query_length;
        p.query_mask_token_stride = 1;
        if (coin()) p.document_mask = document_mask.get();
        p.document_mask_token_stride = 1;
        weights = Buffer<float>(query_tokens);
        for (int64_t i = 0; i < query_tokens; ++i) weights[i] = small_number();
        if (coin()) p.query_weights = weights.get();
        p.query_weights_stride = p.query_length;
        p.query_weights_token_stride = 1;
        threads = some_threads(upto(1, 3));
    }

    void place_documents(const void* memory, int64_t token_stride) {
        p.documents = memory;
        p.document_token_stride = token_stride;
        if (p.packed()) return;
        p.document_stride = longest * token_stride;
        p.document_query_stride = p.candidates ? p.documents_per_query * p.document_stride : 0;
    }

    int64_t first_token(int64_t n) const { return p.packed() ? offsets[n] : n * longest; }
    int64_t length(int64_t n) const { return p.packed() ? offsets[n + 1] - offsets[n] : longest; }
    bool keeps(int64_t token) const { return p.document_mask == nullptr || document_mask[token]; }

    Problem p;
    cpu::Threads threads;
    int64_t longest = 0, tokens = 0, query_tokens = 0, pairs = 0;
    Buffer<int32_t> offsets{0};
    Embeddings queries{Type::float32, 0};
    Buffer<uint8_t> query_mask{0}, document_mask{0};
    Buffer<float> weights{0};
};

void run(int64_t number) {
    Inputs inputs;
    Problem& p = inputs.p;
    const int64_t tokens = inputs.tokens, longest = inputs.longest, query_tokens = inputs.query_tokens;
    const int64_t pairs = inputs.pairs;
    const bool packed = p.packed(), weighted = p.query_weights != nullptr, normalize = upto(0, 3) == 0;
    const bool per_token = coin();
    if (tokens == 0) return;
    if (packed) p.max_length = coin() ? longest : 0;
    const int64_t row = p.query_token_stride, text_row = p.dimension + upto(0, 3);
    Embeddings texts(p.type, (tokens - 1) * text_row + p.dimension);
    inputs.place_documents(texts.bytes.get(), text_row);

    ForwardOutput out;
    const int64_t bound = packed ? 1 + (p.max_length ? std::min(p.max_length, tokens) : tokens) : longest;
    out.code = bound <= 256     ? WinnerCode{WinnerType::uint8, 255, bound < 256 || packed}
               : bound <= 65536 ? WinnerCode{WinnerType::uint16, 65535, true}
                                : WinnerCode{};
    const int64_t winner_bytes = out.code.type == WinnerType::uint8 ? 1 : out.code.type == WinnerType::uint16 ? 2 : 4;
    Buffer<float> scores(per_token ? pairs * p.query_length : pairs), query_scales(query_tokens),
        document_scales(tokens);
    Buffer<char> winners(pairs * p.query_length * winner_bytes);
    out.scores = scores.get();
    out.per_token = per_token;
    out.winners = winners.get();
    out.normalize = normalize;
    out.query_scales = query_scales.get();
    out.document_scales = document_scales.get();
    run_smooth(p, inputs.tokens, number);
    const cpu::Threads& threads = inputs.threads;
    cpu::forward(p, out, threads);
    const bool asked = coin();
    if (asked) {  // the same without winners
        Buffer<float> again(scores.count);
        ForwardOutput plain = out;
        plain.scores = again.get();
        plain.winners = nullptr;
        cpu::forward(p, plain, threads);
        if (std::memcmp(again.get(), scores.get(), scores.count * 4) != 0) fail("scores without winners", number);
    }

    Buffer<float> grad(per_token ? pairs * p.query_length : pairs), grad_weights(query_tokens);
    for (int64_t i = 0; i < grad.count; ++i) grad[i] = small_number();
    BackwardInput in;
    in.rule.rule = per_token ? Rule::tokens : Rule::scores;
    in.rule.grad = grad.get();
    in.winners = winners.get();
    in.code = out.code;
    if (normalize) {
        in.query_scales = query_scales.get();
        in.document_scales = document_scales.get();
    }
    const int64_t bytes = p.type == Type::float32 ? 4 : 2;
    Buffer<char> grad_queries(query_tokens * p.dimension * bytes), grad_documents(tokens * p.dimension * bytes);
    BackwardOutput gradients{grad_queries.get(), grad_documents.get(), weighted ? grad_weights.get() : nullptr};
    cpu::backward(p, in, gradients, threads);
    if (normalize) return;  // norms are no small integers: the Python tests compare these

    std::vector<double> want_queries(query_tokens * p.dimension), want_documents(tokens * p.dimension);
    for (int64_t i = 0; i < p.query_count; ++i) {
        for (int64_t j = 0; j < p.documents_per_query; ++j) {
            const int64_t n = (p.candidates ? i * p.documents_per_query : 0) + j, pair = i * p.documents_per_query + j;
            const int64_t first = inputs.first_token(n), length = inputs.length(n);
            double score = 0;
            for (int64_t r = 0; r < p.query_length; ++r) {
                const int64_t own = i * p.query_length + r;
                double best = -1e30, value = 0;
                int64_t winner = -1;
                const bool counts = p.query_mask == nullptr || inputs.query_mask[own];
                for (int64_t t = 0; counts && t < length; ++t) {
                    if (!inputs.keeps(first + t)) continue;
                    double similarity = 0;
                    for (int64_t d = 0; d < p.dimension; ++d) {
                        similarity += as_float(p.type, p.queries, own * row + d) *
                                      static_cast<double>(as_float(p.type, p.documents, (first + t) * text_row + d));
                    }
                    if (similarity > best) best = similarity, winner = t;
                }
                if (winner >= 0) value = best * (weighted ? inputs.weights[own] : 1.0f);
                score += value;
                if (per_token && scores[pair * p.query_length + r] != value) fail("maximum", number);
                const int64_t at = pair * p.query_length + r;
                const int64_t found = winner_bytes == 1   ? reinterpret_cast<uint8_t*>(winners.get())[at]
                                      : winner_bytes == 2 ? reinterpret_cast<uint16_t*>(winners.get())[at]
                                                          : reinterpret_cast<int32_t*>(winners.get())[at];
                if (winner >= 0 ? found != winner : out.code.marked && found != out.code.none) fail("winner", number);
                if (winner < 0) continue;
                const double g = per_token ? grad[at] : grad[pair],
                             factor = g * (weighted ? inputs.weights[own] : 1.0f);
                for (int64_t d = 0; d < p.dimension; ++d) {
                    want_queries[own * p.dimension + d] +=
                        factor * as_float(p.type, p.documents, (first + winner) * text_row + d);
                    want_documents[(first + winner) * p.dimension + d] +=
                        factor * as_float(p.type, p.queries, own * row + d);
                }
            }
            if (!per_token && scores[pair] != score) fail("score", number);
        }
    }
    // Sums of small integers are exact in float32; half precision rounds once.
    const double relative = p.type == Type::float32 ? 0 : p.type == Type::float16 ? 1.0 / 2048 : 1.0 / 256;
    const auto compare = [&](const Buffer<char>& found, const std::vector<double>& wanted, const char* what) {
        for (size_t i = 0; i < wanted.size(); ++i) {
            const double value = as_float(p.type, found.get(), static_cast<int64_t>(i));
            if (std::fabs(value - wanted[i]) > relative * std::fabs(wanted[i])) fail(what, number);
        }
    };
    compare(grad_queries, want_queries, "gradient of queries");
    compare(grad_documents, want_documents, "gradient of documents");
}

// e4m3 of a small number.
uint8_t float8(float value) {
    const uint8_t codes[] = {0x00, 0x38, 0x40, 0x44};
    return static_cast<uint8_t>(codes[static_cast<int>(std::fabs(value))] | (value < 0 ? 0x80 : 0));
}

// Scores of decoded tokens [tokens, D] by the definition.
void compare_scores(const Inputs& inputs, const std::vector<float>& decoded, const Buffer<float>& scores,
                    int64_t number) {
    const Problem& p = inputs.p;
    for (int64_t i = 0; i < p.query_count; ++i) {
        for (int64_t j = 0; j < p.documents_per_query; ++j) {
            const int64_t n = (p.candidates ? i * p.documents_per_query : 0) + j, first = inputs.first_token(n);
            double score = 0;
            for (int64_t r = 0; r < p.query_length; ++r) {
                const int64_t own = i * p.query_length + r;
                if (p.query_mask && !inputs.query_mask[own]) continue;
                double best = -1e30;
                for (int64_t t = first; t < first + inputs.length(n); ++t) {
                    double similarity = 0;
                    for (int64_t d = 0; d < p.dimension; ++d) {
                        similarity += static_cast<double>(decoded[t * p.dimension + d]) *
                                      as_float(p.type, p.queries, own * p.query_token_stride + d);
                    }
                    if (inputs.keeps(t)) best = std::max(best, similarity);
                }
                if (best > -1e30) score += best * (p.query_weights ? inputs.weights[own] : 1.0f);
            }
            if (scores[i * p.documents_per_query + j] != score) fail("score of compressed documents", number);
        }
    }
}

void run_quantized(int64_t number) {
    Inputs inputs;
    const Problem& p = inputs.p;
    if (inputs.tokens == 0) return;
    const bool int8 = coin();
    const int64_t row = p.dimension + upto(0, 3);
    Buffer<uint8_t> values((inputs.tokens - 1) * row + p.dimension);
    Buffer<float> scales(inputs.tokens), scores(inputs.pairs);
    std::vector<float> decoded(inputs.tokens * p.dimension);
    for (int64_t t = 0; t < inputs.tokens; ++t) {
        scales[t] = static_cast<float>(upto(1, 4)) / 2;
        for (int64_t d = 0; d < p.dimension; ++d) {
            const float value = small_number();
            values[t * row + d] = int8 ? static_cast<uint8_t>(static_cast<int>(value)) : float8(value);
            decoded[t * p.dimension + d] = value * scales[t];
        }
    }
    inputs.place_documents(values.get(), row);
    const QuantizedDocuments documents{int8 ? ValueType::int8 : ValueType::float8_e4m3fn, scales.get()};
    cpu::quantized_forward(p, documents, scores.get(), inputs.threads);
    compare_scores(inputs, decoded, scores, number);
}

void run_residual(int64_t number) {
    Inputs inputs;
    Problem& p = inputs.p;
    if (inputs.tokens == 0) return;
    ResidualDocuments documents;
    documents.bits = 1 << upto(0, 3);
    const int64_t fields = 8 / documents.bits;
    p.dimension = p.dimension / fields * fields;
    if (p.dimension == 0) return;
    const int64_t width = p.dimension / fields, row = width + upto(0, 3);
    documents.centroid_type = static_cast<Type>(upto(0, 2));
    documents.centroid_count = upto(1, 20);
    documents.centroid_stride = p.dimension + upto(0, 3);
    const Embeddings centroids(documents.centroid_type,
                               (documents.centroid_count - 1) * documents.centroid_stride + p.dimension);
    Buffer<float> weights(int64_t{1} << documents.bits), scores(inputs.pairs);
    for (int64_t i = 0; i < weights.count; ++i) weights[i] = small_number();
    Buffer<uint8_t> residuals((inputs.tokens - 1) * row + width);
    for (int64_t i = 0; i < residuals.count; ++i) residuals[i] = static_cast<uint8_t>(upto(0, 255));
    Buffer<int32_t> codes(inputs.tokens);
    std::vector<float> decoded(inputs.tokens * p.dimension);
    for (int64_t t = 0; t < inputs.tokens; ++t) {
        codes[t] = static_cast<int32_t>(inputs.keeps(t) ? upto(0, documents.centroid_count - 1) : upto(-9, 1 << 30));
        for (int64_t d = 0; inputs.keeps(t) && d < p.dimension; ++d) {
            const int shift = static_cast<int>(8 - documents.bits * (d % fields + 1));
            const int field = residuals[t * row + d / fields] >> shift & ((1 << documents.bits) - 1);
            decoded[t * p.dimension + d] = weights[field] + as_float(documents.centroid_type, centroids.bytes.get(),
                                                                     codes[t] * documents.centroid_stride + d);
        }
    }
    documents.codes = codes.get();
    documents.centroids = centroids.bytes.get();
    documents.field_weights = weights.get();
    documents.normalize = true;  // lengths are no small integers: the Python tests compare these
    inputs.place_documents(residuals.get(), row);
    cpu::residual_forward(p, documents, scores.get(), inputs.threads);
    documents.normalize = false;
    cpu::residual_forward(p, documents, scores.get(), inputs.threads);
    compare_scores(inputs, decoded, scores, number);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t problems = argc > 1 ? std::atoll(argv[1]) : 1000;
    generator.seed(argc > 2 ? std::atoi(argv[2]) : 0);
    for (int64_t i = 0; i < problems; ++i) {
        run(i);
        run_quantized(i);
        run_residual(i);
    }
    std::printf("%s: %lld problems\n", cpu::instruction_set(), static_cast<long long>(problems));
}
