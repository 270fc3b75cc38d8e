// The vectorised inner loops of the CPU path, one set per instruction set, as a table of function pointers.
//
// The functions are written once (cpu_kernels.h) over a small vector type and compiled once for each instruction set
// (cpu_portable.cpp, cpu_avx2.cpp, cpu_avx512.cpp, cpu_avx512bf16.cpp); cpu_dispatch.cpp chooses when the program runs.

#pragma once

#include <cstdint>

#include "compressed_problem.h"

namespace jmlr::maxsim::cpu {

// Query rows of a panel: this many vectors side by side. Two suffice to hide the latency of loads and products.
constexpr int widest_panel = 2;

// Of a vector shorter than this, the direction is noise: it is divided by the floor instead (torch's own default).
constexpr float norm_floor = 1e-12f;

// Weights of a residual's fields, repeated as often as they go: as many as 8 bits can name.
constexpr int64_t field_table = 256;

// The maxima of one panel of query rows over a run of document tokens.
//
// The panel holds, for every step along the embedding dimension, one 32-bit unit of each row: a float, or a pair of
// bfloat16. Document rows are read where they lie, in the same units.
struct PanelTask {
    const void* panel = nullptr;      // [steps][vectors * lanes] units, aligned to 64 bytes
    int vectors = 0;                  // 1 to widest_panel
    int64_t steps = 0;                // units of a row, a last half pair included
    bool half_step = false;           // the last unit of a document row is half a pair: nothing is read behind it
    const char* first_row = nullptr;  // token k's row is first_row + k * row_bytes,
    int64_t row_bytes = 0;
    const char* const* rows = nullptr;  // or rows[k], where excluded tokens lie between
    int64_t tokens = 0;                 // at least 1
    int64_t prefetch_bytes = 0;         // how far ahead memory is asked for; 0: rows lie in a cache
    const float* scales = nullptr;      // null, or one factor for each token's similarities
    float* best = nullptr;              // [vectors * lanes] maxima so far, updated
    int32_t* winners = nullptr;         // the same of their positions; null: not asked for
    int32_t first_position = 0;         // of the first token
};

// What smooth MaxSim adds (cpu_smooth_kernels.h). A block of similarities is [tokens][widest_panel * lanes]: a token's
// numbers for the rows of one panel, which may be fewer, side by side.
struct SharesTask {
    float* block = nullptr;  // similarities, replaced by shares times factors
    int64_t tokens = 0;
    int vectors = 0;                 // of the panel
    float exponent_scale = 0;        // log2(e) / temperature
    const float* maxima = nullptr;   // of each row, aligned; -inf: no share
    const float* factors = nullptr;  // of each row, aligned
};

// sums[m][n] += sum over k < depth of left(m, k) * right[k][n].
struct ProductTask {
    const float* left = nullptr;   // a block: (m, k) at m * row + k, or transposed at k * row + m,
    bool transposed = false;       // where row is widest_panel * lanes
    const float* right = nullptr;  // slices of widest_panel * lanes columns: k's elements of slice s are at
    int64_t slice = 0;             // s * slice + k * widest_panel * lanes
    float* sums = nullptr;         // [rows][columns]
    int64_t rows = 0;
    int64_t depth = 0;
    int64_t columns = 0;  // a multiple of lanes
};

struct SmoothInstructions {
    // Similarities of a panel and document rows; of bfloat16 by pairs as above. `block` has room for task.tokens.
    void (*similarities)(const PanelTask& task, float* block);
    void (*similarities_of_pairs)(const PanelTask& task, float* block);
    // Online: afterwards best holds the rows' maxima so far (of NaN: of the others) and total the sum of
    // exp2((similarity - best) * exponent_scale), or of exp2(similarity * exponent_scale) where best is infinite.
    void (*add_exponentials)(const float* block, int64_t tokens, int vectors, float exponent_scale, float* best,
                             float* total);
    void (*shares)(const SharesTask& task);
    void (*add_product)(const ProductTask& task);
};

// The form of a decoded row: units of a panel's kind. Rounded ones are floats whose values the type holds.
enum class Row { float32, bfloat16, rounded_to_float16, rounded_to_bfloat16 };

// What all tokens of residual codes have in common (compressed_problem.h).
struct ResidualFormat {
    Type centroid_type = Type::float32;
    int bits = 0;
    bool normalize = false;
    Row row = Row::float32;
    int64_t dimension = 0;
    const float* weights = nullptr;  // [field_table], aligned to 64 bytes
};

struct Instructions {
    const char* name;
    int lanes;  // floats in a vector
    // Maxima of similarities, float32 throughout; and of bfloat16 by pairs, null where the processor has no such
    // product.
    void (*maxima)(const PanelTask& task);
    void (*maxima_of_pairs)(const PanelTask& task);
    // sum[d] += coefficients[k] * rows[k][d] for k = 0, 1, ..., in this order.
    void (*weighted_sum)(Type type, const void* const* rows, const float* coefficients, int64_t count,
                         int64_t dimension, float* sum);
    float (*dot)(const float* a, const float* b, int64_t dimension);
    void (*widen)(Type type, const void* from, int64_t dimension, float* to);
    void (*narrow)(Type type, const float* from, int64_t dimension, void* to);  // to the nearest, ties to even
    // The row is float32, or bfloat16 where there are products of pairs.
    void (*decode_values)(ValueType type, const void* from, int64_t dimension, Row row, void* to);
    // Returns a factor that the row's similarities still want: only unrounded rows need not have unit length. `scratch`
    // has room for a row in float32.
    float (*decode_residual)(const ResidualFormat& format, const void* centroid, const void* fields, float* scratch,
                             void* to);
    SmoothInstructions smooth;
};

const Instructions& portable_instructions();
// On x86-64 only.
const Instructions& avx2_instructions();
const Instructions& avx512_instructions();
const Instructions& avx512bf16_instructions();

// The best set that this processor runs, no better than the environment variable JMLR_CPU_ISA (portable, avx2, avx512,
// avx512bf16) says; read once. Throws std::runtime_error where the variable names no set, or one that cannot run.
const Instructions& instructions();

}  // namespace jmlr::maxsim::cpu
