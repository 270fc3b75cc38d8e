"""Timings of the kernels against plain torch and against other libraries, on a CPU and on a GPU."""
