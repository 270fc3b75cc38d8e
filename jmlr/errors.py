"""The one exception for bad input: what is wrong, where, and what to do about it, on one line."""

from __future__ import annotations

from os import PathLike, fspath


class UserError(Exception):
    """Input that the user can put right. The command line prints it as one line and exits with code 2.

    Args:
        message: what is wrong, as a sentence without its full stop.
        file: the file (or the option) that holds the mistake.
        line: its line in that file, counted from 1.
        remedy: what to do, as a sentence without its full stop.
    """

    def __init__(
        self, message: str, *, file: str | PathLike[str] | None = None, line: int | None = None, remedy: str
    ) -> None:
        self.message = message
        self.file = None if file is None else fspath(file)
        self.line = line
        self.remedy = remedy
        super().__init__(message, self.file, line, remedy)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross process boundaries.
        return _rebuild, (self.message, self.file, self.line, self.remedy)

    def __str__(self) -> str:
        place = ""
        if self.file is not None:
            place = f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "
        return f"{place}{_sentence(self.message)} {_capital(_sentence(self.remedy))}"


def _rebuild(message: str, file: str | None, line: int | None, remedy: str) -> UserError:
    return UserError(message, file=file, line=line, remedy=remedy)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else text + "."
