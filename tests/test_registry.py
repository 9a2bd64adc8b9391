"""From names to classes: shipped ones, a user's own, and what is told when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.algorithm import Algorithm
from fedsim.errors import ConfigError, OwnCodeError
from fedsim.registry import names, resolve

OWN = """
from fedsim.algorithms.fedavg import FedAvg

class Mine(FedAvg):
    pass

class Bare(FedAvg):
    Config = dict

class Stranger:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the Python path with modules of the user's own."""
    (tmp_path / "own_algorithm.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import no_such_module_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def algorithm(name: str) -> type[Algorithm]:
    return resolve(name, "fedsim.algorithms", Algorithm, "algorithm")


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        algorithm(name)
    (mistake,) = caught.value.mistakes
    return mistake


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("fedavg", "FedAvg"), ("fedavg_ft", "FedAvgFt"), ("local", "Local"), ("pfedseq", "PFedSeq")],
)
def test_shipped(name: str, class_name: str) -> None:
    found = algorithm(name)
    assert found.__name__ == class_name
    assert found.__module__ == f"fedsim.algorithms.{name}"


def test_names_are_sorted_and_resolve() -> None:
    found = names("fedsim.algorithms", Algorithm)
    assert found == sorted(found) and {"fedavg", "fedavg_ft", "local", "pfedseq"} <= set(found)
    assert all(issubclass(algorithm(name), Algorithm) for name in found)


def test_unknown_name_gets_the_nearest() -> None:
    assert refused("pfedsec") == "algorithm: unknown algorithm 'pfedsec', did you mean 'pfedseq'?"


def test_own_class(own: Path) -> None:
    found = algorithm("own_algorithm:Mine")
    assert found.__name__ == "Mine" and issubclass(found, Algorithm)


def test_missing_module(own: Path) -> None:
    assert refused("own_algoritm:Mine") == (
        "algorithm: no module 'own_algoritm' on the Python path (from 'own_algoritm:Mine')"
    )


def test_missing_module_in_a_missing_package() -> None:
    assert "no module 'no_such_package.inner'" in refused("no_such_package.inner:Mine")


@pytest.mark.parametrize("name", [":Foo", ".x:Foo", "x.:Foo", "a..b:Foo", ":"])
def test_a_malformed_name(name: str) -> None:
    assert refused(name) == f"algorithm: {name!r} is not module:Class"


def test_missing_class_gets_the_nearest(own: Path) -> None:
    assert refused("own_algorithm:Mien") == "algorithm: 'own_algorithm' has no class 'Mien', did you mean 'Mine'?"


def test_not_a_subclass(own: Path) -> None:
    assert refused("own_algorithm:Stranger") == (
        "algorithm: 'own_algorithm:Stranger' is not a subclass of fedsim's Algorithm"
    )


def test_an_error_inside_the_users_module_keeps_its_traceback(own: Path) -> None:
    with pytest.raises(OwnCodeError) as caught:
        algorithm("own_broken:Mine")
    assert caught.value.what == "algorithm=own_broken:Mine: import"
    assert caught.value.original.endswith("ModuleNotFoundError: No module named 'no_such_module_of_theirs'\n")


def test_a_config_is_a_dataclass(own: Path) -> None:
    assert refused("own_algorithm:Bare") == "algorithm: 'own_algorithm:Bare' has no Config that is a dataclass"
