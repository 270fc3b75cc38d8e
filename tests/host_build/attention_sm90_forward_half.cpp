#include "../../csrc/shifted_attention/sm90_forward_half.cu"
