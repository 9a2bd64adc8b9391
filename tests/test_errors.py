"""Errors keep their text on the way from a worker to the driver."""

from __future__ import annotations

import inspect
import pickle

import pytest

from fedsim import errors
from fedsim.errors import (
    BlockFailedError,
    CentralLostError,
    ClientError,
    ConfigError,
    DataError,
    FedsimError,
    NotStartedError,
    OwnCodeError,
    UserError,
    nearest,
    own_code,
)

EXAMPLES = {
    ConfigError: (["a: wrong", "b: wrong"],),
    OwnCodeError: ("env=mine:Mine: build", "Traceback …\nValueError: no\n"),
    ClientError: ("train", 2, [4, 7], "Traceback …\nValueError: no\n"),
    BlockFailedError: (0, [1, 2], 3, "SIGKILL"),
    CentralLostError: (0, "SIGKILL"),
    NotStartedError: (2, "simulator", 600.4, "runs/one"),
}
CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, FedsimError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_survives_pickling(kind: type[FedsimError]) -> None:
    error = kind(*EXAMPLES.get(kind, ("path: what is wrong",)))
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_mistakes_of_the_caller_are_told_apart() -> None:
    assert {kind.__name__ for kind in CLASSES if not issubclass(kind, UserError)} == {
        "FedsimError",
        "ClientError",
        "BlockFailedError",
        "CentralLostError",
        "DeviceMemoryError",
        "OwnCodeError",
        "NotStartedError",
        "RunError",
    }


def test_config_error_has_a_line_a_mistake() -> None:
    assert str(ConfigError(["a: wrong", "b: wrong"])) == "a: wrong\nb: wrong"


def test_client_error_names_stage_round_clients_and_cause() -> None:
    error = ClientError("train", 2, [4, 7], "Traceback …\nValueError: no\n")
    assert str(error) == "train failed in round 3, clients [4, 7]\nTraceback …\nValueError: no"


def test_own_code_is_named_and_keeps_its_traceback() -> None:
    with pytest.raises(OwnCodeError) as caught, own_code("env=mine:Mine: build"):
        {}["nothing"]
    told = str(caught.value)
    assert told.startswith("env=mine:Mine: build failed\nTraceback") and told.endswith("\nKeyError: 'nothing'")


def test_own_code_may_tell_of_a_mistake_in_one_line_and_may_run_out_of_memory() -> None:
    with pytest.raises(DataError, match=r"^no such file$"), own_code("env=mine:Mine: build"):
        raise DataError("no such file")
    with pytest.raises(DataError, match=r"^env=mine: not enough memory \(9 TiB\)$"), own_code("env=mine"):
        raise MemoryError("9 TiB")


def test_client_error_shows_eight_clients() -> None:
    assert "clients [0, 1, 2, 3, 4, 5, 6, 7, …]\n" in str(ClientError("train", 0, list(range(9)), "x"))
    assert "clients [0, 1, 2, 3, 4, 5, 6, 7]\n" in str(ClientError("train", 0, list(range(8)), "x"))


def test_block_failed_names_round_clients_and_cause() -> None:
    error = BlockFailedError(0, [1, 2], 3, "SIGKILL")
    assert str(error) == "round 1: the simulators of clients [1, 2] died 3 times; the last one: SIGKILL"


def test_no_simulators_names_the_command_that_goes_on() -> None:
    assert str(NotStartedError(2, "simulator", 600.4, "runs/one")) == (
        "round 3: no simulator could be started for 600 s; the last checkpoint is whole; once the cluster has room: "
        "python -m fedsim resume runs/one"
    )


def test_nearest() -> None:
    assert nearest("fedagv", ["local", "fedavg"]) == ", did you mean 'fedavg'?"
    assert nearest("xyz", ["local", "fedavg"]) == "; choose from fedavg, local"
    assert nearest("xyz", []) == ""


def test_nearest_of_many_names_a_handful() -> None:
    many = [f"model_{number}" for number in range(100)] + ["xy"]
    told = nearest("xyzuvw", many)
    assert told.startswith("; choose from xy, ") and told.endswith(", …") and told.count(",") == 8
