"""The examples of the documents, so that tests can run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page or a part of one, in their order: language and code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """The parts of a page in docs/ under its second-level headings."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
