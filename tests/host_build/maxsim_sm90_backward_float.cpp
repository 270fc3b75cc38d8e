#include "../../csrc/maxsim/sm90_backward_float.cu"
