// Numbers out of compressed bytes, without a conversion that only newer chips have.
#pragma once

#include "compressed_problem.h"
#include "rows.cuh"

namespace jmlr::maxsim {

// An int8 held in the low byte of `bits`. As the low byte of 2**23's mantissa it is itself less an offset, exactly;
// an integer's conversion takes four times as long.
JMLR_DEVICE float from_int8(uint32_t bits) {
    constexpr float kOffset = 8388608.0f + 128.0f;
    return tiles::bit_cast<float>(0x4b000000u | ((bits & 0xffu) ^ 0x80u)) - kOffset;
}

// A float8 e4m3fn in the low byte of `bits`. Exponent and mantissa move to float's places; float's exponent bias is
// larger by 120, which a product corrects, and subnormal codes, subnormal floats until then, come out right too.
JMLR_DEVICE float from_float8(uint32_t bits) {
    constexpr float kBias = 1.329227995784916e36f;  // 2**120
    uint32_t magnitude = bits & 0x7fu;
    float value = tiles::bit_cast<float>((bits & 0x80u) << 24 | magnitude << 20) * kBias;
    return magnitude == 0x7fu ? tiles::bit_cast<float>(0x7fc00000u) : value;
}

template <ValueType kType>
JMLR_DEVICE float from_byte(uint32_t bits) {
    if constexpr (kType == ValueType::int8) return from_int8(bits);
    else return from_float8(bits);
}

// Eight bit fields side by side, the first in the highest bits of `high`.
struct Fields {
    uint32_t high, low;
};

JMLR_DEVICE uint32_t bytes_reversed(uint32_t word) {
    return word << 24 | (word & 0xff00u) << 8 | (word >> 8 & 0xff00u) | word >> 24;
}

// The first field, which is then dropped.
JMLR_DEVICE int next_field(Fields& fields, int bits) {
    int field = int(fields.high >> (32 - bits));
    fields.high = fields.high << bits | fields.low >> (32 - bits);
    fields.low <<= bits;
    return field;
}

// Fields `first` and on of a row of `count`, `first` a multiple of eight; what lies past its end is anything. `whole`:
// the row starts at a multiple of `bits` bytes and has a multiple of eight fields.
JMLR_DEVICE Fields load_fields(const uint8_t* row, int first, int count, int bits, bool whole) {
    const uint8_t* from = row + int64_t(first / 8) * bits;
    uint32_t word[2] = {0, 0};  // bytes in memory's order
    if (first >= count) return {0, 0};
    if (whole) {
        if (bits == 1) word[0] = tiles::load(from);
        else if (bits == 2) word[0] = tiles::load(reinterpret_cast<const uint16_t*>(from));
        else if (bits == 4) word[0] = tiles::load(reinterpret_cast<const uint32_t*>(from));
        else {
            auto both = tiles::load(reinterpret_cast<const Word<8>*>(from));
            word[0] = both.word[0];
            word[1] = both.word[1];
        }
    } else {
        int bytes = tiles::smaller(bits, (count - first) * bits / 8);
        for (int i = 0; i < bytes; ++i) {
            uint32_t byte = uint32_t(tiles::load(from + i)) << i % 4 * 8;
            if (i < 4) word[0] |= byte;
            else word[1] |= byte;
        }
    }
    return {bytes_reversed(word[0]), bytes_reversed(word[1])};
}

// Eight neighbours of a row of any of the three types; see load_slice. `row` null: zeros.
JMLR_DEVICE Slice<8> load_centroid(const void* row, Type type, int first, int columns, bool whole) {
    if (row == nullptr) return {};
    if (type == Type::float16) return load_slice<8>(static_cast<const tiles::Half*>(row), first, columns, whole);
    if (type == Type::bfloat16) return load_slice<8>(static_cast<const tiles::BFloat16*>(row), first, columns, whole);
    auto left = load_slice<4>(static_cast<const float*>(row), first, columns, whole);
    auto right = load_slice<4>(static_cast<const float*>(row), first + 4, columns, whole);
    Slice<8> both;
    JMLR_UNROLL
    for (int i = 0; i < 8; ++i) both.value[i] = i < 4 ? left.value[i % 4] : right.value[i % 4];
    return both;
}

// Into a tile, in as few accesses as there are chunks; `column` is a multiple of eight.
template <class Tile>
JMLR_DEVICE void write_slice(const Tile& tile, int row, int column, const Slice<8>& slice) {
    JMLR_UNROLL
    for (int first = 0; first < 8; first += Tile::kPerChunk) {
        tiles::Chunk chunk;
        JMLR_UNROLL
        for (int i = 0; i < 4; ++i) {
            chunk.word[i] = word_of<typename Tile::Element>(slice, first * 4 / Tile::kPerChunk + i);
        }
        tile.at(row, column + first).template as<tiles::Chunk>().write(0, chunk);
    }
}

}  // namespace jmlr::maxsim
