#include "../../csrc/maxsim/sm90_backward.cu"
#include "../../csrc/maxsim/sm90_backward_bfloat16.cu"
