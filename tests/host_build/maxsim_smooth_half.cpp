#include "../../csrc/maxsim/smooth_sm80_half.cu"
