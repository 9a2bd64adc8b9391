"""Per-FedAvg. Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020 (arXiv 2002.07948); its first-order variant, FO.

For every step, with two batches A and B drawn independently, from x = w:

    y = x - a grad F_i(x; A)                                the model after one step of adaptation
    x <- x - b grad F_i(y; B)                               the full method's factor I - a Hessian is left out

    w <- sum_i n_i x_i / sum_i n_i
    v_i = w - a grad F_i(w; A)                              evaluated and thrown away

A and B come from two shuffled passes over the client's data: an epoch has as many steps as FedAvg's, of two gradients
each, and a client with a single batch takes part. Deviations: the mean is weighted by n_i; x is stepped by the
optimiser that ``local`` names. ``a = 0`` is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.algorithm import State
from fedsim.local import Batch, LocalContext
from fedsim.schema import setting

from .fedavg import FedAvg


class PerFedAvg(FedAvg):
    """The average is trained to be a good start: one step away from a good model of every client."""

    kind = "personal"
    paper = "Fallah et al., NeurIPS 2020 (arXiv 2002.07948)"

    @dataclass(frozen=True)
    class Config:
        a: float | None = setting(None, "rate of the adaptation step; default: local.lr; 0 is FedAvg", low=0)
        b: float | None = setting(None, "rate of local training; default: local.lr", low=0)

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        second = ctx.batches()

        def after_adaptation(x: Tensor, A: Batch) -> Tensor:
            return ctx.grad(x - self._a(ctx) * ctx.grad(x, A), next(second))

        x = ctx.sgd(payload["w"], gradient=after_adaptation, lr=self.config.b)
        return {"delta": x - payload["w"]}, rows

    def personalise(self, payload: State, rows: State, ctx: LocalContext) -> Tensor:
        return payload["w"] - self._a(ctx) * ctx.grad(payload["w"], next(ctx.batches()))

    def _a(self, ctx: LocalContext) -> float:
        return ctx.local.lr if self.config.a is None else self.config.a
