#include "../../csrc/maxsim/sm90_backward_half.cu"
