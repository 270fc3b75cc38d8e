#include "../../csrc/maxsim/loss_rows.cu"
