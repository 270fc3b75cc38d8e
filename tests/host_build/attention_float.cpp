#include "../../csrc/shifted_attention/sm80_float.cu"
