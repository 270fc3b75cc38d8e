// Compressed documents on the way to their tiles (tokens.cuh): values with a scale, and residual codes.
#pragma once

#include "compressed_decode.cuh"
#include "tokens.cuh"

namespace jmlr::maxsim {

// int8 or float8 with a float scale per token. Every value is exact in every element type; the scale multiplies the
// similarity.
struct QuantizedTokens {
    using Stored = uint8_t;
    struct Params {
        QuantizedDocuments documents;
    };

    static constexpr ForwardTiles tiles_of(int element_size, int dimension, bool few_rows) {
        return compressed_tiles(element_size, dimension, few_rows);
    }
    static constexpr bool kWinners = false, kDecoded = true;
    template <class Tile>
    using Bytes = tiles::SharedTile<uint8_t, Tile::kRows, Tile::kColumns>;
    template <class Tile>
    static constexpr int kStageBytes = Bytes<Tile>::kBytes;
    template <class Tile>
    static constexpr int kOwnBytes = 0;

    template <class Tile, int kThreads, class Position>
    static JMLR_DEVICE void fetch(int stage, const Problem& p, const Params&, const Text<uint8_t>& text,
                                  Position position, int column, bool whole) {
        fetch_rows<kThreads>(Bytes<Tile>(stage), p, text, position, column, whole);
    }

    static JMLR_DEVICE const float* scales(const Params& own, const ForwardOutput&) { return own.documents.scales; }

    template <int kThreads>
    static JMLR_DEVICE void prepare(int, const Params&) {}

    template <int kThreads, class Tile>
    static JMLR_DEVICE void decode(const Tile& to, int stage, int, const Problem&, const Params& own,
                                   const Text<uint8_t>&, int) {
        Bytes<Tile> from(stage);
        if (own.documents.type == ValueType::int8) decode_values<kThreads, ValueType::int8>(to, from);
        else decode_values<kThreads, ValueType::float8_e4m3fn>(to, from);
    }

private:
    template <int kThreads, ValueType kType, class Tile>
    static JMLR_DEVICE void decode_values(const Tile& to, const Bytes<Tile>& from) {
        constexpr int kSlices = Tile::kColumns / 8;
        for (int i = tiles::thread_index(); i < Tile::kRows * kSlices; i += kThreads) {
            int row = i / kSlices, column = i % kSlices * 8;
            auto bytes = from.at(row, column).template as<Word<8>>().read();
            Slice<8> values;
            JMLR_UNROLL
            for (int j = 0; j < 8; ++j) values.value[j] = from_byte<kType>(bytes.word[j / 4] >> j % 4 * 8);
            write_slice(to, row, column, values);
        }
    }
};

// A centroid plus a weight per element, at unit length if asked for. A stage holds which tokens they are; their bytes
// and centroids go from global memory through registers into the tile. Eight lanes share a token.
struct ResidualTokens {
    using Stored = uint8_t;
    struct Params {
        ResidualDocuments documents;
        bool whole_residuals, whole_centroids;  // see load_fields and load_slice
    };

    static constexpr ForwardTiles tiles_of(int element_size, int dimension, bool few_rows) {
        return compressed_tiles(element_size, dimension, few_rows);
    }
    static constexpr bool kWinners = false, kDecoded = true;
    template <class Tile>
    static constexpr int kStageBytes = 2 * Tile::kRows * 4;  // positions, codes
    static constexpr int kWeightsBytes = 256 * 4;
    template <class Tile>
    static constexpr int kOwnBytes = kWeightsBytes + Tile::kRows * 4;  // weights of the fields, factors of the tokens

    template <class Tile, int kThreads, class Position>
    static JMLR_DEVICE void fetch(int stage, const Problem&, const Params& own, const Text<uint8_t>& text,
                                  Position position, int, bool) {
        static_assert(Tile::kRows <= kThreads);
        int i = tiles::thread_index();
        if (i >= Tile::kRows) return;
        int place = position(i);
        tiles::shared_memory<int>(stage).write(i, place);
        tiles::shared_memory<int>(stage).write(Tile::kRows + i, tiles::load(own.documents.codes + text.place + place));
    }

    static JMLR_DEVICE const float* scales(const Params&, const ForwardOutput&) { return nullptr; }

    template <int kThreads>
    static JMLR_DEVICE void prepare(int at, const Params& own) {
        for (int i = tiles::thread_index(); i < 1 << own.documents.bits; i += kThreads) {
            tiles::shared_memory<float>(at).write(i, tiles::load(own.documents.field_weights + i));
        }
    }

    template <int kThreads, class Tile>
    static JMLR_DEVICE void decode(const Tile& to, int stage, int at, const Problem& p, const Params& own,
                                   const Text<uint8_t>& text, int column) {
        constexpr int kLanes = 8, kSlices = Tile::kColumns / (8 * kLanes);  // of a lane
        constexpr int kTokens = kThreads / kLanes;                          // at a time
        static_assert(Tile::kColumns % (8 * kLanes) == 0 && Tile::kRows % kTokens == 0);
        auto weights = tiles::shared_memory<float>(at), factors = tiles::shared_memory<float>(at + kWeightsBytes);
        int lane = tiles::thread_index() % kLanes;
        for (int row = tiles::thread_index() / kLanes; row < Tile::kRows; row += kTokens) {
            Token token = token_of<Tile>(stage, row, p, own, text);
            Slice<8> slices[kSlices];
            JMLR_UNROLL
            for (int i = 0; i < kSlices; ++i) {
                slices[i] = token.slice(column + (i * kLanes + lane) * 8, int(p.dimension), own, weights);
            }
            float factor;
            if (column == 0) {
                factor = token.centroid == nullptr ? tiles::bit_cast<float>(0x7fc00000u) : 1.0f;
                if (own.documents.normalize) {
                    float squares = 0.0f;
                    JMLR_UNROLL
                    for (int i = 0; i < kSlices; ++i) squares += squares_of(slices[i]);
                    // The token's length takes all of its chunks.
                    for (int later = Tile::kColumns + lane * 8; later < int(p.dimension); later += kLanes * 8) {
                        squares += squares_of(token.slice(later, int(p.dimension), own, weights));
                    }
                    JMLR_UNROLL
                    for (int mask = 1; mask < kLanes; mask *= 2) squares += tiles::shuffle_xor(squares, mask);
                    factor *= inverse_norm(squares);
                }
                if (lane == 0) factors.write(row, factor);
            } else {
                factor = factors.read(row);
            }
            JMLR_UNROLL
            for (int i = 0; i < kSlices; ++i) {
                JMLR_UNROLL
                for (int j = 0; j < 8; ++j) slices[i].value[j] *= factor;
                write_slice(to, row, (i * kLanes + lane) * 8, slices[i]);
            }
        }
    }

private:
    struct Token {
        const uint8_t* residual;
        const void* centroid;  // null: its code names none

        JMLR_DEVICE Slice<8> slice(int first, int dimension, const Params& own,
                                   const tiles::Shared<float>& weights) const {
            Fields fields = load_fields(residual, first, dimension, own.documents.bits, own.whole_residuals);
            Slice<8> slice =
                load_centroid(centroid, own.documents.centroid_type, first, dimension, own.whole_centroids);
            JMLR_UNROLL
            for (int j = 0; j < 8; ++j) {
                int field = next_field(fields, own.documents.bits);
                if (first + j < dimension) slice.value[j] += weights.read(field);
            }
            return slice;
        }
    };

    template <class Tile>
    static JMLR_DEVICE Token token_of(int stage, int row, const Problem& p, const Params& own,
                                      const Text<uint8_t>& text) {
        int place = tiles::shared_memory<int>(stage).read(row);
        int code = tiles::shared_memory<int>(stage).read(Tile::kRows + row);
        const ResidualDocuments& d = own.documents;
        int element = d.centroid_type == Type::float32 ? 4 : 2;
        bool known = code >= 0 && code < d.centroid_count;
        return {text.first + place * p.document_token_stride,
                known ? static_cast<const uint8_t*>(d.centroids) + code * d.centroid_stride * element : nullptr};
    }

    static JMLR_DEVICE float squares_of(const Slice<8>& slice) {
        float sum = 0.0f;
        JMLR_UNROLL
        for (int i = 0; i < 8; ++i) sum += slice.value[i] * slice.value[i];
        return sum;
    }
};

}  // namespace jmlr::maxsim
