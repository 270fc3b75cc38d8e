#include "../../csrc/maxsim/sm80_compressed_half.cu"
