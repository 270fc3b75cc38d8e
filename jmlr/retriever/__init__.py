"""The retriever: a ColBERT encoder and an exact index over its token embeddings."""

from jmlr.retriever.encoder import ColBERT, ColBERTTokenizer
from jmlr.retriever.index import ExactIndex

__all__ = ["ColBERT", "ColBERTTokenizer", "ExactIndex"]
