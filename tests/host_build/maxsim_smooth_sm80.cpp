#include "../../csrc/maxsim/smooth_sm80.cu"
