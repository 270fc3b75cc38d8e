"""Nested frozen dataclasses from YAML, with the line of every mistake.

The text is composed into nodes, not loaded into values: nodes know their lines, and the field's type, not YAML's
guess, decides what a scalar means (``1e-3`` is a number here, ``no`` is a text where a text is wanted).
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union

import yaml

from jmlr.errors import UserError

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_INTEGER = re.compile(r"[-+]?\d[\d_]*")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Problem:
    """A contradiction between settings: ``key``'s, reported at the first of ``key`` and ``others`` that was given."""

    key: str
    message: str
    remedy: str
    others: tuple[str, ...] = ()


class Settings(Protocol):
    """What :func:`read` builds."""

    def problems(self) -> Iterator[Problem]: ...


SettingsType = TypeVar("SettingsType", bound=Settings)


def number(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a range: ``low`` and ``high`` belong to it, ``above`` and ``below`` do not."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "below": below})


@dataclass(frozen=True)
class _Place:
    file: str
    line: int | None

    def error(self, message: str, remedy: str) -> UserError:
        return UserError(message, file=self.file, line=self.line, remedy=remedy)


@dataclass
class _Tree:
    """Settings as given: dotted key -> scalar or sequence node, with its place. Later entries replace earlier ones."""

    values: dict[str, tuple[yaml.Node, _Place]]


def read(kind: type[SettingsType], text: str, file: str, overrides: Sequence[str] = ()) -> SettingsType:
    """Settings of class ``kind`` from YAML text and ``key=value`` overrides.

    Raises:
        UserError: see :func:`jmlr.config.load`.
    """
    tree = _Tree({})
    root = _compose(text, file)
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise _place(root, file).error("the file does not hold settings", "write lines of the form key: value")
        _collect(kind, root, "", file, tree)
    for override in overrides:
        _override(kind, override, tree)
    config = typing.cast(SettingsType, _build(kind, "", tree))
    for problem in config.problems():
        given = [tree.values[key][1] for key in (problem.key, *problem.others) if key in tree.values]
        place = given[0] if given else _Place(file, 1)
        raise place.error(f"{problem.key}: {problem.message}", problem.remedy)
    return config


def scalar(key: str, text: str, file: str, allowed: Sequence[str], default: str) -> str:
    """One setting of the top level by itself: what decides as which class the others are read.

    Raises:
        UserError: no YAML, or a value that is not `allowed`.
    """
    root = _compose(text, file)
    for name, node in root.value if isinstance(root, yaml.MappingNode) else ():
        if name.value == key:
            return _convert(node, Literal[tuple(allowed)], key, _place(node, file))
    return default


def write(config: Any, path: Path) -> None:
    """Write all settings, so that a reader never sees half a file."""
    text = yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def differences(one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two settings of one class differ, with both values."""
    found = []
    for entry in fields(one):
        left, right = getattr(one, entry.name), getattr(other, entry.name)
        if is_dataclass(left):
            found += [(f"{entry.name}.{key}", a, b) for key, a, b in differences(left, right)]
        elif left != right:
            found.append((entry.name, left, right))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise UserError(
            f"the file is not valid YAML ({error.problem})", file=file, line=line, remedy="check indentation and quotes"
        ) from None
    except yaml.YAMLError:
        raise UserError(
            "the file holds characters that YAML does not allow", file=file, line=1, remedy="save it as plain text"
        ) from None


def _place(node: yaml.Node, file: str) -> _Place:
    return _Place(file, node.start_mark.line + 1)


def _collect(kind: type, mapping: yaml.MappingNode, prefix: str, file: str, tree: _Tree) -> None:
    sections = _sections(kind)
    seen: set[str] = set()
    for key_node, value in mapping.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        place = _place(key_node, file)
        _check_key(kind, name, prefix, place)
        if name in seen:
            raise place.error(f"{prefix}{name} is set twice", "keep one of the two")
        seen.add(name)
        if name not in sections:
            tree.values[prefix + name] = value, place
        elif isinstance(value, yaml.MappingNode):
            _collect(sections[name], value, f"{prefix}{name}.", file, tree)
        elif value.value != "" or not isinstance(value, yaml.ScalarNode):
            raise place.error(f"{prefix}{name} is a section of settings", f"indent its settings under '{name}:'")


def _override(kind: type, override: str, tree: _Tree) -> None:
    place = _Place(f"--set {override}", None)
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise place.error("the option is not of the form KEY=VALUE", "write for example --set train.steps=20")
    section, prefix = kind, ""
    *path, last = key.strip().split(".")
    for name in path:
        _check_key(section, name, prefix, place)
        if name not in _sections(section):
            raise place.error(f"{prefix}{name} is not a section", f"write --set {prefix}{name}=VALUE")
        section, prefix = _sections(section)[name], f"{prefix}{name}."
    _check_key(section, last, prefix, place)
    if last in _sections(section):
        raise place.error(f"{prefix}{last} is a section of settings", f"write --set {prefix}{last}.KEY=VALUE")
    node = _compose(text, place.file) or yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    tree.values[prefix + last] = node, place


def _check_key(kind: type, name: str, prefix: str, place: _Place) -> None:
    valid = [entry.name for entry in fields(kind)]
    if name in valid:
        return
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    remedy = f"did you mean {prefix}{close[0]}?" if close else f"the settings here are {', '.join(valid)}"
    raise place.error(f"there is no setting {prefix}{name}", remedy)


def _sections(kind: type) -> dict[str, type]:
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in fields(kind) if is_dataclass(hints[entry.name])}


def _build(kind: type, prefix: str, tree: _Tree) -> Any:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for entry in fields(kind):
        key, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            values[entry.name] = _build(typing.cast(type, hint), f"{key}.", tree)
        elif key in tree.values:
            node, place = tree.values[key]
            value = _convert(node, hint, key, place)
            _check_range(value, dict(entry.metadata), key, place)
            values[entry.name] = value
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(f"{key} is not set", remedy=f"set {key}")
    for name, value in getattr(kind, "PRESETS", {}).get(values.get("preset"), {}).items():
        values.setdefault(name, value)
    return kind(**values)


def _convert(node: yaml.Node, hint: Any, key: str, place: _Place) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if node.tag == "tag:yaml.org,2002:null":
            return None
        return _convert(node, next(a for a in arguments if a is not type(None)), key, place)
    if origin is tuple:
        return _sequence(node, arguments, key, place)
    if not isinstance(node, yaml.ScalarNode):
        raise place.error(f"{key} takes one value, not a list or a section", f"write {key} as {_wanted(hint)}")
    text, quoted = node.value.strip(), node.style in ("'", '"')
    if origin is Literal:
        if text not in arguments:
            close = difflib.get_close_matches(text, arguments, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            raise place.error(
                f"{key} is '{text}'", f"{guess}{'The' if guess else 'the'} choices are {', '.join(arguments)}"
            )
        return text
    if hint is str and (quoted or node.tag == "tag:yaml.org,2002:str"):
        return node.value
    if hint is bool and not quoted and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if hint is int and not quoted and _INTEGER.fullmatch(text):
        return int(text)
    if hint is float and not quoted and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    raise place.error(f"{key} is {_shown(node)}", f"write {_wanted(hint)}")


def _sequence(node: yaml.Node, arguments: tuple[Any, ...], key: str, place: _Place) -> tuple[Any, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise place.error(f"{key} is not a list", f"write it in brackets, as in {key}: [a, b]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        kinds: Sequence[Any] = [arguments[0]] * len(node.value)
    else:
        kinds = arguments
        if len(node.value) != len(kinds):
            raise place.error(f"{key} has {len(node.value)} values", f"give {len(kinds)} of them")
    return tuple(
        _convert(item, kind, f"{key}[{index}]", place)
        for index, (item, kind) in enumerate(zip(node.value, kinds, strict=True))
    )


def _check_range(value: Any, limits: dict[str, float | None], key: str, place: _Place) -> None:
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above, below = (limits.get(name) for name in ("low", "high", "above", "below"))
    outside = (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    )
    if outside:
        bounds = [
            f"{words} {bound:g}"
            for words, bound in (("at least", low), ("more than", above), ("at most", high), ("less than", below))
            if bound is not None
        ]
        raise place.error(f"{key} is {value:g}", f"give a number {' and '.join(bounds)}")


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text (in quotes)"}[hint]


def _shown(node: yaml.ScalarNode) -> str:
    return f"'{node.value}'" if node.value else "empty"
