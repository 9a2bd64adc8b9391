"""Typed settings: what each type takes, and that every mistake is told at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from fedsim.schema import Raw, build, setting


@dataclass(frozen=True)
class Settings:
    count: int = setting(1, "a count", low=0, high=10)
    total: int = setting(1, "a count without end", low=0)
    rate: float = setting(0.5, "a rate", low=0)
    on: bool = setting(False, "a switch")
    text: str = setting("x", "a text")
    mean: float | None = setting(None, "may be left out", low=0)
    kinds: tuple[str, ...] = setting(("a",), "some kinds", choices=("a", "b"))
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count == 7 and self.on:
            raise ValueError("seven cannot be on")


def told(values: Any, where: str = "part") -> list[str]:
    mistakes: list[str] = []
    assert build(Settings, values, where, mistakes) is None
    return mistakes


def made(**values: Any) -> Settings:
    mistakes: list[str] = []
    built = build(Settings, values, "part", mistakes)
    assert mistakes == []
    return built


def test_defaults() -> None:
    assert made() == Settings()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rate", 2, 2.0),
        ("rate", "1e-3", 0.001),  # YAML 1.1 reads it as text
        ("text", 5, "5"),
        ("text", None, ""),
        ("mean", None, None),
        ("mean", 1, 1.0),
        ("kinds", ["a", "b"], ("a", "b")),
        ("kinds", "b", ("b",)),
        ("options", {"a": 1}, {"a": 1}),
        ("options", None, {}),
        ("rate", Raw("1e-3"), 0.001),
        ("text", Raw("1e-3"), "1e-3"),
        ("text", Raw("null"), "null"),
        ("mean", Raw("null"), None),
        ("kinds", Raw("[a, b]"), ("a", "b")),
        ("kinds", Raw("b"), ("b",)),
        ("options", Raw("{a: 1}"), {"a": 1}),
        ("options", {"a": Raw("1"), "b": {"c": Raw("")}}, {"a": 1, "b": {"c": ""}}),
        ("count", 10, 10),
        ("count", 0, 0),
    ],
)
def test_accepted(key: str, value: Any, expected: Any) -> None:
    got = getattr(made(**{key: value}), key)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", 1.0, "part.count: 1.0 is not a whole number"),
        ("count", True, "part.count: True is not a whole number"),
        ("count", "1", "part.count: '1' is not a whole number"),
        ("count", None, "part.count: None is not a whole number"),
        ("count", -1, "part.count: -1 is below 0"),
        ("count", 11, "part.count: 11 is above 10"),
        ("rate", "fast", "part.rate: 'fast' is not a number"),
        ("rate", True, "part.rate: True is not a number"),
        ("rate", "nan", "part.rate: 'nan' is not a number"),
        ("rate", float("inf"), "part.rate: inf is not a number"),
        ("rate", 10**400, f"part.rate: {10**400} is not a number"),
        ("rate", Raw("[1"), "part.rate: '[1' is not a value"),
        ("rate", Raw("9" * 5000), f"part.rate: '{'9' * 5000}' is not a value"),
        ("on", 1, "part.on: 1 is not true or false"),
        ("on", "yes", "part.on: 'yes' is not true or false"),
        ("total", 2**63, f"part.total: {2**63} is beyond 2^63"),
        ("text", ["x"], "part.text: ['x'] is not a text"),
        ("mean", -0.5, "part.mean: -0.5 is below 0"),
        ("kinds", ["a", "bb"], "part.kinds: unknown choice 'bb', did you mean 'b'?"),
        ("options", 3, "part.options: 3 is not a mapping"),
        ("cuont", 3, "part.cuont: unknown key, did you mean 'count'?"),
    ],
)
def test_refused(key: str, value: Any, message: str) -> None:
    assert told({key: value}) == [message]


def test_all_mistakes_at_once_in_their_order() -> None:
    assert told({"rate": "x", "colour": 1, "on": 2}) == [
        "part.rate: 'x' is not a number",
        "part.colour: unknown key; choose from count, kinds, mean, on, options, rate, text, total",
        "part.on: 2 is not true or false",
    ]


def test_without_a_section_keys_stand_alone() -> None:
    assert told({"rate": "x"}, where="") == ["rate: 'x' is not a number"]


def test_a_section_must_have_keys() -> None:
    assert told([1]) == ["part: [1] is not a section with keys"]
    assert told(Raw("0")) == ["part: 0 is not a section with keys"]
    assert told(Raw("[1")) == ["part: '[1' is not a value"]


@pytest.mark.parametrize("text", ["!!bool maybe", "!!int ''", "!!timestamp x", "[" * 2000, "&a [*a]", "*a", "{a: 1"])
def test_what_yaml_cannot_read_is_no_value(text: str) -> None:
    assert told({"rate": Raw(text)}) == [f"part.rate: {text!r} is not a value"]


def test_an_empty_section_is_one_of_defaults() -> None:
    mistakes: list[str] = []
    assert build(Settings, None, "part", mistakes) == build(Settings, Raw("{}"), "part", mistakes) == Settings()
    assert mistakes == []


def test_fields_may_be_checked_against_each_other() -> None:
    assert told({"count": 7, "on": True}) == ["part: seven cannot be on"]


def test_earlier_mistakes_of_others_do_not_stop_a_section() -> None:
    mistakes = ["other: wrong"]
    assert build(Settings, {"count": 3}, "part", mistakes) == Settings(count=3)
    assert mistakes == ["other: wrong"]
