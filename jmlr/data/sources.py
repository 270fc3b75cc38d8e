"""Where data comes from: embedded slices and files by name, read line by line with positions for error messages."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

from jmlr.errors import UserError

EMBEDDED_PREFIX = "embedded:"
DATA_VARIABLE = "JMLR_DATA"
SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".csv")
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and where it stands."""

    fields: dict[str, Any]
    file: str
    line: int

    def error(self, message: str, remedy: str) -> UserError:
        """An error at this record's place."""
        return UserError(message, file=self.file, line=self.line, remedy=remedy)

    def text(self, name: str, *, required: bool = True) -> str:
        """The text under ``name``, stripped; empty only when it is not ``required``.

        Raises:
            UserError: it is missing, not text, or (when required) blank.
        """
        value = self.fields.get(name)
        if value is None:
            if required:
                raise self.error(f"the field '{name}' is missing", f"give every record a '{name}'")
            return ""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise self.error(
                f"the field '{name}' holds {json.dumps(value)[:60]}, not text", f"write '{name}' as a JSON string"
            )
        value = value.strip()
        if required and not value:
            raise self.error(f"the field '{name}' is empty", f"fill '{name}' in, or remove the record")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The list of texts under ``name``; a missing field is an empty list.

        Raises:
            UserError: it is not a list of strings.
        """
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"the field '{name}' is not a list of texts", f"write '{name}' as a JSON list of strings")
        return tuple(item.strip() for item in value)


@dataclass(frozen=True, slots=True)
class Source:
    """A file or a slice embedded in the package, under the name that error messages use."""

    name: str
    path: Path | None
    resource: str = ""

    def open(self) -> IO[bytes]:
        """The decompressed bytes. Compression is told by the content, not by the name."""
        try:
            if self.path is not None:
                stream: IO[bytes] = self.path.open("rb")
            else:
                stream = resources.files("jmlr.data").joinpath("embedded", self.resource).open("rb")
        except OSError as error:
            raise UserError(
                f"the file cannot be read ({error.strerror or error})", file=self.name, remedy="check the path"
            ) from None
        compressed = stream.read(2) == _GZIP_MAGIC
        stream.seek(0)
        return cast(IO[bytes], gzip.open(stream)) if compressed else stream

    def lines(self) -> Iterator[tuple[int, str]]:
        """Numbered lines, from 1, without line ends.

        Raises:
            UserError: a truncated or damaged gzip stream, or bytes that are not UTF-8.
        """
        number = 0
        with self.open() as stream:
            while True:
                try:
                    line = stream.readline()
                except (EOFError, zlib.error, gzip.BadGzipFile):
                    raise UserError(
                        "the compressed file is truncated or damaged after this line",
                        file=self.name,
                        line=max(number, 1),
                        remedy="copy or download the file again",
                    ) from None
                if not line:
                    return
                number += 1
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"byte {error.start + 1} of the line is not UTF-8",
                        file=self.name,
                        line=number,
                        remedy="save the file in the UTF-8 encoding",
                    ) from None
                yield number, text.rstrip("\r\n")

    def read(self) -> str:
        """The whole text, with the same checks as :meth:`lines`."""
        return "\n".join(line for _, line in self.lines())

    def records(self) -> Iterator[Record]:
        """One JSON object a line; blank lines are skipped.

        Raises:
            UserError: a line that is not a JSON object.
        """
        for number, line in self.lines():
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "depth"
                raise UserError(
                    f"the line is not valid JSON ({reason})",
                    file=self.name,
                    line=number,
                    remedy="write one JSON object a line",
                ) from None
            if not isinstance(fields, dict):
                raise UserError(
                    f"the line holds a JSON {_json_kind(fields)}, not an object",
                    file=self.name,
                    line=number,
                    remedy="write one JSON object a line",
                )
            yield Record(fields, self.name, number)


def find(name: str | PathLike[str], data_dir: str | PathLike[str] | None = None) -> list[Source]:
    """The sources a name stands for.

    A plain name is looked up under ``data_dir`` (or, without one, under the directory in ``$JMLR_DATA``), then as a
    path from the working directory, each time also with the usual suffixes added. A directory stands for all the
    ``.jsonl`` and ``.jsonl.gz`` files in it, in the order of their names.

    Raises:
        UserError: there is nothing under that name, or the directory holds no such file.
    """
    wanted = os.fspath(name)
    roots = [root for root in (data_dir or os.environ.get(DATA_VARIABLE), ".") if root is not None]
    for root in roots:
        base = Path(root).expanduser() / Path(wanted).expanduser()
        candidates = [base, *(base.with_name(base.name + suffix) for suffix in SUFFIXES if base.name)]
        for path in candidates:
            if path.is_file():
                return [Source(_display(path), path)]
            if path.is_dir():
                return _directory(path)
    named = ["the working directory" if root == "." else os.fspath(root) for root in roots]
    looked = "" if Path(wanted).is_absolute() else " under " + " or ".join(named)
    raise UserError(
        f"there is no such file{looked}",
        file=wanted,
        remedy=f"correct the path, or set data.data_dir or ${DATA_VARIABLE} to the directory that holds the data",
    )


def _directory(path: Path) -> list[Source]:
    files = sorted(file for file in path.iterdir() if file.name.endswith((".jsonl", ".jsonl.gz")) and file.is_file())
    if not files:
        raise UserError(
            "the directory holds no .jsonl or .jsonl.gz file",
            file=_display(path),
            remedy="point to the files themselves, or put them there",
        )
    return [Source(_display(file), file) for file in files]


def _display(path: Path) -> str:
    text = os.fspath(path)
    return text.removeprefix("./")


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "list", str: "string", bool: "boolean"}.get(type(value), "number")
