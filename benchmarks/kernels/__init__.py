"""CPU timings by pytest-benchmark: `make bench`."""
