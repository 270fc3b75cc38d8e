#include "../../csrc/maxsim/sm80_compressed_float.cu"
