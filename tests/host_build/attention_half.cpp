#include "../../csrc/shifted_attention/sm80_half.cu"
