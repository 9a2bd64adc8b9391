"""pFedMe. T. Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020
(arXiv 2006.08848).

For every batch, from x = theta = w:

    theta <- theta - r (grad F_i(theta) + lam (theta - x))  K times: to the minimum of F_i + lam/2 |theta - x|^2
    x     <- x - lr lam (x - theta)                         a gradient step on the Moreau envelope of F_i

    w <- (1 - beta) w + beta sum_i n_i x_i / sum_i n_i      theta_i is evaluated, and kept by the client

theta goes on from batch to batch, as in the authors' code. Deviations: the inner rate is r = lr / (1 + lr lam), stable
for every lam for which SGD with lr is (the authors tune it by itself, for every lam); the mean is weighted by n_i.
With lam to infinity theta is x, and x takes FedAvg's steps. x is stepped by the optimiser that ``local`` names; theta,
which is solved for, by plain gradient steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.algorithm import Cohort, ServerState, State
from fedsim.local import LocalContext, Optimiser
from fedsim.schema import setting

from .fedavg import FedAvg


class PFedMe(FedAvg):
    """Every client solves a problem of its own near the average, and moves the average towards its solution."""

    kind = "personal"
    paper = "T. Dinh et al., NeurIPS 2020 (arXiv 2006.08848)"

    @dataclass(frozen=True)
    class Config:
        lam: float = setting(15.0, "strength of the pull of theta to x", low=1e-3)
        inner_steps: int = setting(5, "K, steps on theta for a batch", low=1)
        beta: float = setting(1.0, "share of the new average in w; 0: w never moves", low=0)

    def init_client(self, params: Tensor) -> State:
        return {"theta": params}

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        lam, lr = self.config.lam, ctx.local.lr
        rate = lr / (1 + lr * lam)
        x = payload["w"].expand(len(ctx.ids), -1).clone()
        theta = x.clone()
        optimiser = Optimiser(ctx.local, x)
        for batch in ctx.batches():
            m = batch.clients  # whoever has left keeps its theta: the pull alone would draw it on to x
            for _ in range(self.config.inner_steps):
                theta[:m] -= rate * (ctx.grad(theta, batch)[:m] + lam * (theta[:m] - x[:m]))
            optimiser.step(x[:m], lam * (x[:m] - theta[:m]), left=batch.left)
        return {"delta": x - payload["w"]}, {"theta": theta}

    def aggregate(self, server: ServerState, cohort: Cohort, update: State, rows: State) -> tuple[ServerState, State]:
        return {"w": server["w"] + self.config.beta * cohort.mean(update["delta"])}, rows

    def personalise(self, payload: State, rows: State, ctx: LocalContext) -> Tensor:
        return rows["theta"]
