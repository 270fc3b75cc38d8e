#include "../../csrc/shifted_attention/sm80_bfloat16.cu"
