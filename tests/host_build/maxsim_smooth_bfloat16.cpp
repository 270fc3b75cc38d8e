#include "../../csrc/maxsim/smooth_sm80_bfloat16.cu"
