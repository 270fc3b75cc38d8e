#include "../../csrc/maxsim/sm80_float.cu"
