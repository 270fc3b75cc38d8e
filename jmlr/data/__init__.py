"""Passages and questions: loading, checking, wording. Nothing here imports torch."""
