#include "../../csrc/maxsim/sm90.cu"
#include "../../csrc/maxsim/sm90_half.cu"
