#include "../../csrc/maxsim/sm80_half.cu"
