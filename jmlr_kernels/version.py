"""The version of the distribution `jmlr-kernels`: pyproject.toml reads it here, and so does everybody else."""

__version__ = "0.1.0"
