// Where the tokens of a MaxSim problem lie, and pieces of their embeddings in the registers of a warp.
#pragma once

#include "../tiles/primitives.h"
#include "problem.h"

namespace jmlr::maxsim {

// n / divisor without a division, for 0 <= n < 2**31 (Granlund and Montgomery, PLDI 1994).
class Divider {
public:
    Divider() = default;
    explicit Divider(int64_t divisor) : divisor_(int(divisor)) {
        while ((int64_t(1) << shift_) < divisor) ++shift_;
        multiplier_ =
            uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - uint64_t(divisor))) / uint64_t(divisor) + 1);
    }

    JMLR_DEVICE int divide(int n) const {
        return int((uint32_t(uint64_t(uint32_t(n)) * multiplier_ >> 32) + uint32_t(n)) >> shift_);
    }
    JMLR_DEVICE int divisor() const { return divisor_; }

private:
    int divisor_ = 1;
    uint32_t multiplier_ = 1;
    int shift_ = 0;
};

// One document's tokens: the first one's embedding, its place among all documents' tokens, how many there are.
template <class Element>
struct Text {
    const Element* first;
    int64_t place;
    int length;
};

JMLR_DEVICE int64_t document_number(const Problem& p, int64_t query, int64_t document) {
    return p.candidates ? query * p.documents_per_query + document : document;
}

template <class Element>
JMLR_DEVICE Text<Element> text_of(const Problem& p, int64_t query, int64_t document) {
    const Element* documents = static_cast<const Element*>(p.documents);
    int64_t number = document_number(p, query, document);
    if (p.cu_seqlens != nullptr) {
        int start = tiles::load(p.cu_seqlens + number);
        int end = tiles::load(p.cu_seqlens + number + 1);
        return {documents + start * p.document_token_stride, start, end - start};
    }
    const Element* first =
        documents + (p.candidates ? query * p.document_query_stride : 0) + document * p.document_stride;
    return {first, number * p.document_length, int(p.document_length)};
}

// The bytes of a document's mask, `place` being its text's.
JMLR_DEVICE const uint8_t* document_mask_of(const Problem& p, int64_t query, int64_t document, int64_t place) {
    if (p.cu_seqlens != nullptr) return p.document_mask + place * p.document_mask_token_stride;
    return p.document_mask + (p.candidates ? query * p.document_mask_query_stride : 0) +
           document * p.document_mask_stride;
}

// Tokens [outer, inner, length] of any strides, numbered in this order.
template <class Element>
struct TokenList {
    const Element* first;
    int64_t outer_count, inner_count, length;
    int64_t outer_stride, inner_stride, stride;

    JMLR_BOTH int64_t count() const { return outer_count * inner_count * length; }
    JMLR_DEVICE const Element* row(int64_t number) const {
        int64_t list = number / length, outer = list / inner_count;
        return first + outer * outer_stride + (list - outer * inner_count) * inner_stride +
               (number - list * length) * stride;
    }
};

template <class Element>
TokenList<Element> query_tokens(const Problem& p) {
    const Element* first = static_cast<const Element*>(p.queries);
    return {first, 1, p.query_count, p.query_length, 0, p.query_stride, p.query_token_stride};
}

template <class Element>
TokenList<Element> document_tokens(const Problem& p) {
    const Element* first = static_cast<const Element*>(p.documents);
    if (p.cu_seqlens != nullptr) return {first, 1, 1, p.packed_tokens, 0, 0, p.document_token_stride};
    return {first,
            p.candidates ? p.query_count : 1,
            p.documents_per_query,
            p.document_length,
            p.document_query_stride,
            p.document_stride,
            p.document_token_stride};
}

template <class Element>
JMLR_DEVICE const Element* query_row(const Problem& p, int64_t query, int64_t token) {
    return static_cast<const Element*>(p.queries) + query * p.query_stride + token * p.query_token_stride;
}

JMLR_DEVICE bool query_token_counts(const Problem& p, int64_t query, int64_t token) {
    if (p.query_mask == nullptr) return true;
    return tiles::load(p.query_mask + query * p.query_mask_stride + token * p.query_mask_token_stride) != 0;
}

JMLR_DEVICE float query_weight(const Problem& p, int64_t query, int64_t token) {
    if (p.query_weights == nullptr) return 1.0f;
    return tiles::load(p.query_weights + query * p.query_weights_stride + token * p.query_weights_token_stride);
}

// kCount neighbours of a row, in float.
template <int kCount>
struct Slice {
    float value[kCount];
};

template <int kBytes>
struct alignas(kBytes) Word {
    uint32_t word[kBytes / 4];
};

// Neighbours side by side as they lie in memory.
template <int kCount, class Element>
JMLR_DEVICE Slice<kCount> slice_of(const Word<kCount* int(sizeof(Element))>& word) {
    Slice<kCount> slice;
    JMLR_UNROLL
    for (int i = 0; i < kCount; ++i) {
        if constexpr (sizeof(Element) == 4) {
            slice.value[i] = tiles::bit_cast<float>(word.word[i]);
        } else {
            slice.value[i] = tiles::to_float(Element{uint16_t(word.word[i / 2] >> i % 2 * 16)});
        }
    }
    return slice;
}

// Columns `first` and on of a row of `columns`, zeros past its end. `whole`: `row + first` is aligned to the slice's
// size.
template <int kCount, class Element>
JMLR_DEVICE Slice<kCount> load_slice(const Element* row, int first, int columns, bool whole) {
    using Neighbours = Word<kCount* int(sizeof(Element))>;
    if (whole && first + kCount <= columns)
        return slice_of<kCount, Element>(tiles::load(reinterpret_cast<const Neighbours*>(row + first)));
    Slice<kCount> slice;
    JMLR_UNROLL
    for (int i = 0; i < kCount; ++i) {
        slice.value[i] = first + i < columns ? tiles::to_float(tiles::load(row + first + i)) : 0.0f;
    }
    return slice;
}

// Word i of a slice's neighbours side by side.
template <class Element, int kCount>
JMLR_DEVICE uint32_t word_of(const Slice<kCount>& slice, int i) {
    if constexpr (sizeof(Element) == 4) return tiles::bit_cast<uint32_t>(slice.value[i]);
    else return tiles::pack<Element>(slice.value[2 * i], slice.value[2 * i + 1]);
}

// To an address that is aligned to the slice's size, or to 16 bytes.
template <int kCount, class Element>
JMLR_DEVICE void store_whole(Element* to, const Slice<kCount>& slice) {
    constexpr int kBytes = kCount * int(sizeof(Element)), kWordBytes = tiles::smaller(kBytes, 16);
    JMLR_UNROLL
    for (int part = 0; part < kBytes / kWordBytes; ++part) {
        Word<kWordBytes> word;
        JMLR_UNROLL
        for (int i = 0; i < kWordBytes / 4; ++i) word.word[i] = word_of<Element>(slice, part * (kWordBytes / 4) + i);
        tiles::store(reinterpret_cast<Word<kWordBytes>*>(to) + part, word);
    }
}

template <int kCount, class Element>
JMLR_DEVICE void store_slice(Element* row, int first, int columns, bool whole, const Slice<kCount>& slice) {
    if (whole && first + kCount <= columns) return store_whole(row + first, slice);
    JMLR_UNROLL
    for (int i = 0; i < kCount; ++i) {
        if (first + i < columns) tiles::store(row + first + i, tiles::from_float<Element>(slice.value[i]));
    }
}

// A sum over the lanes of a warp, or over each group of kLanes neighbours; the same in every lane and in every run.
template <int kLanes = tiles::kWarp>
JMLR_DEVICE float warp_sum(float x) {
    JMLR_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) x += tiles::shuffle_xor(x, mask);
    return x;
}

// Of a vector shorter than the floor, the direction is noise: it is divided by the floor instead (torch's own default).
constexpr float kNormFloor = 1e-12f;

JMLR_DEVICE float inverse_norm(float squares) { return 1.0f / tiles::maximum_or_nan(sqrtf(squares), kNormFloor); }

JMLR_DEVICE int load_winner(const void* winners, WinnerType type, int64_t place) {
    if (type == WinnerType::uint8) return tiles::load(static_cast<const uint8_t*>(winners) + place);
    if (type == WinnerType::uint16) return tiles::load(static_cast<const uint16_t*>(winners) + place);
    return tiles::load(static_cast<const int32_t*>(winners) + place);
}

JMLR_DEVICE void store_winner(void* winners, WinnerType type, int64_t place, int winner) {
    if (type == WinnerType::uint8) tiles::store(static_cast<uint8_t*>(winners) + place, uint8_t(winner));
    else if (type == WinnerType::uint16) tiles::store(static_cast<uint16_t*>(winners) + place, uint16_t(winner));
    else tiles::store(static_cast<int32_t*>(winners) + place, int32_t(winner));
}

}  // namespace jmlr::maxsim
