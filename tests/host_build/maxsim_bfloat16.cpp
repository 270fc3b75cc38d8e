#include "../../csrc/maxsim/sm80_bfloat16.cu"
