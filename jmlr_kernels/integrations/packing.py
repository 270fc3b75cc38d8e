"""Which documents a batch of packed rows holds, as ``cu_seqlens``, without waiting for the device.

The number of documents is the shape of ``cu_seqlens``, and only the device knows it. Where reading it would wait for
the device, the shape is a bound instead, and the entries that no document uses name the end of the batch: empty
documents, which cost one program each that ends at once. More documents than the bound is an error raised on the
device, never a wrong result.
"""

from __future__ import annotations

import torch

# The bound where nobody sets another: documents of 64 tokens on average, or 64 documents.
TOKENS_PER_DOCUMENT = 64
FEWEST_DOCUMENTS = 64


def may_wait(tensor: torch.Tensor, training: bool) -> bool:
    """Whether a value may be read: on a CPU always, on a GPU outside training; never in a graph of any kind."""
    if torch.compiler.is_compiling():
        return False
    if tensor.device.type == "cpu":
        return True
    return not training and tensor.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def restarts(position_ids: torch.Tensor) -> torch.Tensor:
    """The tokens that begin a document: bool [B, S] for positions [B, S]. A row begins one, and so does every token
    whose position is not its predecessor's plus one, which is the rule of transformers' ``masking_utils``."""
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=-1) != 1], dim=-1)


def documents_of(begins: torch.Tensor, training: bool, most: int | None = None) -> torch.Tensor | None:
    """The documents of rows [B, S] laid end to end: cu_seqlens, int32 [N + 1], from 0 to B * S.

    Args:
        begins: bool [B, S], the tokens that begin a document; true in the first column.
        training: whether the device must not be waited for.
        most: N where the documents cannot be counted without waiting; by default B * S / 64, and not under 64.

    Returns:
        None where they can be counted and every row is one document.

    Raises:
        ValueError: `most` is no number of documents.
        RuntimeError: more documents than N (on a GPU, by an assertion on the device).
    """
    if most is not None and (isinstance(most, (bool, float, str)) or most < begins.shape[0]):
        raise ValueError(f"s2_max_documents={most!r}: give an int, and at least one document for each row of the batch")
    document = begins.flatten().cumsum(0, dtype=torch.int32) - 1
    total = document.shape[0]
    if may_wait(document, training):
        count = int(document[-1]) + 1
        if count == begins.shape[0]:
            return None
    else:
        count = max(FEWEST_DOCUMENTS, total // TOKENS_PER_DOCUMENT, begins.shape[0]) if most is None else most
        torch._assert_async(
            document[-1] < count,
            "position_ids hold more documents than attention 's2' has room for: set config.s2_max_documents, or pass "
            "cu_seq_lens_q, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes it",
        )
    number = torch.arange(count + 1, dtype=torch.int32, device=document.device)
    return torch.searchsorted(document, number, out_int32=True)
