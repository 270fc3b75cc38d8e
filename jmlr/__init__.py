"""Joint medical LLM and retrieval training: a thin layer over transformers, faiss and :mod:`jmlr_kernels`."""
