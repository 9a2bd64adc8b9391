"""Sequence learners: memories of past tokens that answer queries."""

from __future__ import annotations

import torch

from fedsim.sequence.attention import Transformer
from fedsim.sequence.fixed import Last, Mean
from fedsim.sequence.learner import Learner
from fedsim.sequence.mlp import MLP
from fedsim.sequence.recurrent import GRU, LSTM
from fedsim.sequence.scan import selective_scan
from fedsim.sequence.ssd import StateSpaceDual
from fedsim.sequence.ssm import SelectiveSSM

__all__ = ["LEARNERS", "Learner", "make_learner", "selective_scan"]

LEARNERS: dict[str, type[Learner]] = {
    "ssm": SelectiveSSM,
    "ssd": StateSpaceDual,
    "lstm": LSTM,
    "gru": GRU,
    "mlp": MLP,
    "transformer": Transformer,
    "last": Last,
    "mean": Mean,
}


def make_learner(
    name: str, width: int, state_size: int, generator: torch.Generator, half_life: float, budget_mib: float | None
) -> Learner:
    """A learner for tokens of ``width`` channels; the last two are for those that scan.

    Args:
        name: a key of ``LEARNERS``.
        width: k.
        state_size: n.
        generator: draws the parameters.
        half_life: tokens after which half of a token is left, at the start.
        budget_mib: memory for the temporaries of a scan.
    """
    if name in ("ssm", "ssd"):
        return LEARNERS[name](width, state_size, generator, half_life=half_life, budget_mib=budget_mib)  # type: ignore[call-arg]
    return LEARNERS[name](width, state_size, generator)
