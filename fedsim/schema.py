"""Typed settings: documented dataclass fields with ranges, filled from plain values; every mistake is collected."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from fedsim.errors import nearest

T = TypeVar("T")
MOST_VALUES = 100_000
"""Of one YAML text, its aliases followed."""


class Raw(str):
    """The text of a ``key=value`` override: what it means depends on the type of the field that it is for."""

    def parsed(self) -> Any:
        """Its meaning as YAML.

        Raises:
            ValueError: it has none.
        """
        try:
            return from_yaml(self) if self else ""
        except ValueError:
            raise ValueError(f"{str(self)!r} is not a value") from None


def from_yaml(text: str) -> Any:
    """What a YAML text says; the safe loader's types, and nothing else.

    Raises:
        ValueError: it says nothing, or more than ``MOST_VALUES``.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        refuse_endless(node)
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # PyYAML's constructors raise what a value makes them: a KeyError of `!!bool maybe`
        raise ValueError(f"{' '.join(str(error).split())}") from None


def refuse_endless(node: yaml.Node | None) -> None:
    """A few lines unfold into more than any memory holds, where aliases stand for aliases, or for themselves.

    Raises:
        ValueError: these do.
    """
    nodes, found = [node], 0
    while nodes:
        node, found = nodes.pop(), found + 1
        if found > MOST_VALUES:
            raise ValueError(f"its aliases unfold into more than {MOST_VALUES} values")
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def plain(value: Any) -> Any:
    """A tree as YAML has it: dicts, lists, and values that are parsed."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.parsed() if isinstance(value, Raw) else value


def as_section(value: Any) -> dict[str, Any]:
    """The keys of a section; one that is left empty has none.

    Raises:
        ValueError: it is no section.
    """
    value = value.parsed() if isinstance(value, Raw) else value
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a section with keys")
    return dict(value or {})


def setting(
    default: T,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    zero: str = "",
) -> T:
    """A documented dataclass field; values below ``low``, above ``high`` or outside ``choices`` are refused.

    ``zero``: a word that may be written for 0.
    """
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "zero": zero}
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def build(schema: type, values: Any, where: str, mistakes: list[str]) -> Any:
    """An instance of the dataclass ``schema``; what is wrong is added to ``mistakes`` (then the result is ``None``)."""
    prefix = f"{where}." if where else ""
    try:
        values = as_section(values)
    except ValueError as error:
        mistakes.append(f"{where}: {error}")
        return None
    before = len(mistakes)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    accepted = {}
    for key, value in values.items():
        if key not in fields:
            mistakes.append(f"{prefix}{key}: unknown key{nearest(str(key), fields)}")
            continue
        try:
            word = fields[key].metadata.get("zero")
            accepted[key] = 0 if word and value == word else _convert(value, hints[key])
            _check_range(accepted[key], fields[key].metadata)
        except ValueError as error:
            mistakes.append(f"{prefix}{key}: {error}")
    if len(mistakes) > before:
        return None
    try:
        return schema(**accepted)
    except ValueError as error:  # a Config may check its fields against each other in __post_init__
        mistakes.append(f"{where or 'config'}: {error}")
        return None


def _convert(value: Any, hint: Any) -> Any:
    """The value as the hinted type; a whole number is a float, ``1e-3`` in YAML 1.1 is text but means one.

    Raises:
        ValueError: it is of another type.
    """
    if isinstance(value, Raw) and hint is not str:
        value = value.parsed()
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, typing.get_args(hint)[0]) for item in items)
    if origin is dict or hint is dict:
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is not a mapping")
        return plain(value or {})
    if hint is float:
        return _number(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, int, float, bool)):
        return str(value)
    if hint is str and value is None:
        return ""
    expected = {int: "a whole number", bool: "true or false", str: "a text"}.get(hint, str(hint))
    raise ValueError(f"{value!r} is not {expected}")


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):  # of text, and of a whole number beyond all floats
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    return number


def _check_range(value: Any, limits: Mapping[str, Any]) -> None:
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise ValueError(f"unknown choice {item!r}{nearest(str(item), choices)}")
        if item is not None and low is not None and item < low:
            raise ValueError(f"{item} is below {low}")
        if item is not None and high is not None and item > high:
            raise ValueError(f"{item} is above {high}")
        if isinstance(item, int) and item.bit_length() > 63:
            raise ValueError(f"{item} is beyond 2^63")
