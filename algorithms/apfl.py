"""APFL. Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020 (arXiv 2003.13461).

For every batch, all three from the values before it, with g = grad F_i(a v + (1 - a) x) at the mixture:

    x <- x - lr grad F_i(x)                                 the client's copy of w, with a gradient of its own
    v <- v - lr a g
    a <- clamp(a - lr <v - x, g>, 0, 1)                     a_i; v_i and a_i are kept by the client

    w <- sum_i n_i x_i / sum_i n_i                          as FedAvg;  a v_i + (1 - a) w is evaluated

With ``learned = false``, ``a = 1`` is local training and ``a = 0`` FedAvg. Deviations: a is stepped with every batch,
the gradient being there already (the authors' code steps it once a round, which is seldom for clients that are rarely
drawn), and without their weight decay; the mean is weighted by n_i. x and v each have an optimiser, the one that
``local`` names; a takes plain steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.algorithm import State
from fedsim.local import LocalContext, Optimiser
from fedsim.schema import setting

from .fedavg import FedAvg


class APFL(FedAvg):
    """Every client mixes the average with a model of its own, and learns in what proportion."""

    kind = "personal"
    paper = "Deng et al., 2020 (arXiv 2003.13461)"

    @dataclass(frozen=True)
    class Config:
        a: float = setting(0.5, "share of v_i in the mixture, at the start", low=0, high=1)
        learned: bool = setting(True, "every client learns its own share; false: it stays a")

    def init_client(self, params: Tensor) -> State:
        return {"v": params, "a": torch.full((1,), self.config.a)}

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        v, a, lr = rows["v"].clone(), rows["a"].clone(), ctx.local.lr
        x = payload["w"].expand_as(v).clone()
        step_x, step_v = Optimiser(ctx.local, x), Optimiser(ctx.local, v)
        for batch in ctx.batches():
            m = batch.clients
            g, at_x = ctx.grad(a * v + (1 - a) * x, batch), ctx.grad(x, batch)
            slope = ((v - x) * g).sum(1, keepdim=True)
            step_x.step(x[:m], at_x[:m], left=batch.left)
            step_v.step(v[:m], (a * g)[:m], left=batch.left)
            if self.config.learned:
                a = (a - lr * slope).clamp(0, 1)
        return {"delta": x - payload["w"]}, {"v": v, "a": a}

    def personalise(self, payload: State, rows: State, ctx: LocalContext) -> Tensor:
        return rows["a"] * rows["v"] + (1 - rows["a"]) * payload["w"]
