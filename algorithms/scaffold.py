"""SCAFFOLD. Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020
(arXiv 1910.06378); its option II for the control variates.

    x   <- x - lr (grad F_i(x) + c - c_i),  from x = w      K steps; c - c_i takes the client's drift away
    c_i <- c_i - c + (w - x) / (K lr)                       the client's own gradient, averaged over its steps
    w   <- w + lr_s sum_i n_i (x_i - w) / sum_i n_i
    c   <- c + sum_i (c_i' - c_i) / N                       over the cohort; N clients ever train, so c = mean_i c_i

- *K* is the number of steps that each client really took, which differs where n_i does.
- *Weights.* The paper's mean of x_i - w is uniform; here it is FedAvg's, so that round 1 (c = c_i = 0) is FedAvg. c is
  uniform as in the paper, and it decides where the method ends: at the minimum of mean_i F_i, whatever the n_i are.
- *Momentum.* c_i is read from the displacement w - x. With momentum m a gradient moves x once more, by m^j, at the j-th
  step after its own, so K becomes A = sum_{j<K} (K - j) m^j, which is K for m = 0. (With K itself c_i overshoots by
  1 / (1 - m), and from m = 1/2 on the overshoots grow.) Under a local optimiser that is not linear in the gradients c_i
  is a mean step, no mean gradient.
- Both ways twice the bytes of FedAvg, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.algorithm import Cohort, ServerState, State
from fedsim.local import LocalContext
from fedsim.schema import setting

from .fedavg import FedAvg


class Scaffold(FedAvg):
    """FedAvg with control variates: every client's gradient is corrected by what sets it apart from the others."""

    kind = "global"
    paper = "Karimireddy et al., ICML 2020 (arXiv 1910.06378)"

    @dataclass(frozen=True)
    class Config:
        lr_s: float = setting(1.0, "the server's learning rate", low=0)

    def init_server(self, params: Tensor, generator: torch.Generator) -> ServerState:
        return {"w": params.clone(), "c": torch.zeros_like(params)}

    def init_client(self, params: Tensor) -> State:
        return {"c_i": torch.zeros_like(params)}

    def memory_bytes(self) -> int:
        return 2 * super().memory_bytes()

    def broadcast(self, server: ServerState, ids: Tensor, rows: State) -> State:
        return {"w": server["w"][None], "c": server["c"][None]}

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        w, c, before = payload["w"], payload["c"], ctx.steps.clone()
        correction = c - rows["c_i"]
        delta = ctx.sgd(w, pull=lambda x: correction) - w
        applied = applications(ctx.steps - before, ctx.local.momentum)
        change = -c - delta / (ctx.local.lr * applied[:, None])
        return {"delta": delta, "dc_i": change}, {"c_i": rows["c_i"] + change}

    def aggregate(self, server: ServerState, cohort: Cohort, update: State, rows: State) -> tuple[ServerState, State]:
        w = server["w"] + self.config.lr_s * cohort.mean(update["delta"])
        return {"w": w, "c": server["c"] + update["dc_i"].sum(0) / self.task.trainable}, rows


def applications(steps: Tensor, momentum: float) -> Tensor:
    """How often ``steps [C]`` gradients are applied in all, A of the module's docstring: ``[C] float32``."""
    later = torch.arange(int(steps.max()), device=steps.device)
    return ((steps[:, None] - later).clamp(min=0) * momentum**later).sum(1)
