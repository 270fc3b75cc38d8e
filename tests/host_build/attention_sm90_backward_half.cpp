#include "../../csrc/shifted_attention/sm90_backward_half.cu"
