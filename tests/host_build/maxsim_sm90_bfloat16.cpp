#include "../../csrc/maxsim/sm90_bfloat16.cu"
