#include "../../csrc/shifted_attention/sm90_forward_bfloat16.cu"
