#include "../../csrc/shifted_attention/sm90.cu"
