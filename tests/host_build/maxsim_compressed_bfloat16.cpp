#include "../../csrc/maxsim/sm80_compressed_bfloat16.cu"
