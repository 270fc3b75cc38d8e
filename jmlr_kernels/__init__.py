"""Hand-written kernels for retrieval-augmented training, each with gradients.

``maxsim`` names the function here; the folder of the same name is reached by ``from jmlr_kernels.maxsim.x import y``.
"""

from jmlr_kernels.maxsim.function import maxsim, maxsim_candidates, maxsim_tokens
from jmlr_kernels.ops import backend_info
from jmlr_kernels.shifted_attention.flops import attention_pairs
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.version import __version__

__all__ = [
    "__version__",
    "attention_pairs",
    "backend_info",
    "maxsim",
    "maxsim_candidates",
    "maxsim_tokens",
    "shifted_sparse_attention",
]
