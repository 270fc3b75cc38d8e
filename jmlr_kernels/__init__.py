"""Hand-written kernels for retrieval-augmented training, each with gradients.

``maxsim`` names the function here; the folder of the same name is reached by ``from jmlr_kernels.maxsim.x import y``.
"""

from jmlr_kernels.maxsim.compatibility import maxsim_like
from jmlr_kernels.maxsim.function import maxsim, maxsim_candidates, maxsim_tokens
from jmlr_kernels.maxsim.losses import maxsim_contrastive_loss, maxsim_distillation_loss
from jmlr_kernels.maxsim.quantized import maxsim_quantized, quantize_documents
from jmlr_kernels.maxsim.residual import ResidualCodec, maxsim_residual, residual_compress, residual_decompress
from jmlr_kernels.maxsim.smooth import maxsim_smooth
from jmlr_kernels.maxsim.topk import maxsim_topk
from jmlr_kernels.maxsim.xtr import xtr_scores
from jmlr_kernels.ops import backend_info
from jmlr_kernels.shifted_attention.flops import attention_pairs
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.version import __version__

__all__ = [
    "ResidualCodec",
    "__version__",
    "attention_pairs",
    "backend_info",
    "maxsim",
    "maxsim_candidates",
    "maxsim_contrastive_loss",
    "maxsim_distillation_loss",
    "maxsim_like",
    "maxsim_quantized",
    "maxsim_residual",
    "maxsim_smooth",
    "maxsim_tokens",
    "maxsim_topk",
    "quantize_documents",
    "residual_compress",
    "residual_decompress",
    "shifted_sparse_attention",
    "xtr_scores",
]
