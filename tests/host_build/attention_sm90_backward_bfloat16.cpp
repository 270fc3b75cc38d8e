#include "../../csrc/shifted_attention/sm90_backward_bfloat16.cu"
