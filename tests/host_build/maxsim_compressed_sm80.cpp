#include "../../csrc/maxsim/sm80_compressed.cu"
