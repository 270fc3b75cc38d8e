#include "../../csrc/maxsim/smooth_sm80_float.cu"
