"""Shifted sparse attention (the S²-Attn of LongLoRA, arXiv 2309.12307): ``reference.py`` is the definition."""
