#include "../../csrc/maxsim/sm80.cu"
