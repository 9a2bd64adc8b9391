"""pFedSeq. Peng et al., "Look Back for More: Harnessing Historical Sequential Updates for Personalized Federated
Adapter Tuning", AAAI 2025 (arXiv 2501.01653).

The server keeps the clients' past updates; a sequence model over them, a selective state space model computed by a
parallel scan, writes a calibration for each client, which is added to the averaged adapter. So much the paper's
abstract fixes. The rest is this project's reading; docs/pfedseq.md has the reasons and the measurements.

    w_i = w + c_i                          what client i is sent; c_i its calibration
    v_i = SGD(F_i; w_i),  u_i = v_i - w_i  what it makes of it; the update that it returns
    w  <- sum_i n_i v_i / sum_i n_i        the average
    r_i = v_i - w                          its residual to the new average: the token that enters the history
    h   = learner(r_1 ... r_L)             the memory after all tokens, of all clients, round by round
    y_i = h(r_i)                           its answer to the client's own last residual
    c_i = gain (r_i + mix (|r_i| y_i / |y_i| - r_i))

- *Parts.* All this is done for every part of the row by itself: the adapter of a layer, the weights of a class in the
  head. A part of a client finds the parts that are like it among the other clients', and gets what they agree on at its
  own length (the norm after the memory is Mamba-2's). What local training only memorised, nobody shares: it goes.
- ``mix = 0`` (or ``learner = last``, which gives back its last token): a client gets its own last residual back.
  ``gain = 0`` is FedAvg.
- *Training by replay.* Of the clients of the newest ``replay_tokens``, half, drawn anew each round, ask with their
  tokens; the memory holds the other half's. The learner descends 1 - cos(answer, the client's next token, or this one
  while there is no next), all positions at once. A client's own tokens are left out: with them in, it learns to copy.
  A learner that starts by giving its query back has copied it already: only next tokens are a lesson for it.
- *Training by the vector-Jacobian product* (``train = vjp``; the rule of pFedHN, Shamsian et al., ICML 2021): u_i is a
  descent direction of F_i at w_i, so the learner ascends the mean of <c_i, u_i / |u_i|>. No work for clients in either.
- *The mix* may be learned, one for each bank of parts of one form (``held_out > 0``): in no round a client trains on a
  share of its samples, and it sends their gradient at w_i along, one more vector. What it was trained on cannot tell
  what is shared from what is memorised: u_i always asks for more of r_i. What a client ends with is trained on all.
- A client that was never seen has no residual: its calibration is zero and it is sent w; from its first update on, the
  memory answers it like any other. One that was last seen long ago keeps its last residual as its query; with
  ``order = per_client``, where none of its tokens is left, it gets that residual back.
- A cohort of one client is its own average: it has no residual, and this is FedAvg.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.algorithm import Algorithm, Cohort, ServerState, State
from fedsim.history import History
from fedsim.local import LocalContext
from fedsim.schema import setting
from fedsim.sequence import LEARNERS, make_learner
from fedsim.sequence.calibrator import Calibrator, Memories
from fedsim.sequence.parts import Parts

STREAMING = ("ssm", "ssd")
"""Learners whose memory is as large after many tokens as after one, and can be carried on."""


class PFedSeq(Algorithm):
    """A sequential learner over past updates writes each client's calibration."""

    kind = "personal"
    paper = "Peng et al., AAAI 2025 (arXiv 2501.01653)"

    @dataclass(frozen=True)
    class Config:
        learner: str = setting("ssm", "the sequence model", choices=tuple(LEARNERS))
        gain: float = setting(1.0, "factor of the calibration; 0 is FedAvg", low=0)
        mix: float = setting(1.0, "the memory's share; the rest is the client's own last residual", low=0, high=1)
        held_out: float = setting(
            0.0, "share of a client's samples that no round trains on; their gradient teaches the mix", low=0, high=0.9
        )
        mix_step: float = setting(0.1, "most that a round changes the mix by, where it is learned", low=0, high=1)
        parts: str = setting("parts", "a memory for each layer and class, or one for the row", choices=("parts", "row"))
        calibrated: tuple[str, ...] = setting(
            ("adapter", "head"), "groups of the row that are calibrated", choices=("adapter", "head")
        )
        order: str = setting(
            "interleaved", "one sequence of all clients' tokens, or one a client", choices=("interleaved", "per_client")
        )
        tokens: str = setting("residual", "what enters the history", choices=("residual", "update", "both"))
        window: int = setting(10, "rounds that the history holds; 0: as many as per_client fills", low=0)
        per_client: int = setting(0, "newest tokens of a client that it holds; 0: all within the window", low=0)
        dtype: str = setting("fp32", "of the history", choices=("fp32", "bf16"))
        history_mib: int = setting(4096, "memory for the history; a larger one is a memory-mapped file", low=1)
        streaming: bool = setting(False, "carry the memory on; a round adds its own tokens and nothing leaves by age")
        state_size: int = setting(64, "n, the state's size per channel", low=1)
        half_life: float = setting(10.0, "rounds after which half of a token is left, at the start", low=1e-3)
        budget_mib: int = setting(64, "memory for a scan's temporaries", low=1)
        train: str = setting("replay", "how the learner is trained", choices=("none", "replay", "vjp", "both"))
        lr: float = setting(1e-3, "learning rate of the learner (Adam)", low=0)
        replay_tokens: int = setting(128, "newest tokens that are replayed", low=2)
        replay_parts: float = setting(0.1, "share of the parts that are replayed, drawn anew each round", low=0, high=1)
        finetune_epochs: int = setting(1, "local epochs from w_i before evaluation", low=0)

        def __post_init__(self) -> None:
            if not self.calibrated:
                raise ValueError("calibrated: names no group; gain=0 calibrates none")
            if not (self.window or self.per_client):
                raise ValueError("window: 0, and per_client too: one of them has to end the history")
            if self.streaming and (self.order == "per_client" or self.learner not in STREAMING):
                raise ValueError(f"streaming: for order=interleaved and a learner of {', '.join(STREAMING)}")

    def init_server(self, params: Tensor, generator: torch.Generator) -> ServerState:
        config, views = self.config, self._views
        state_size, half_life_tokens = config.state_size, config.half_life * self._tokens_a_round
        calibrator = Calibrator(
            Parts.of(self.task.layout, whole=config.parts == "row"),
            lambda k: make_learner(config.learner, k, state_size, generator, half_life_tokens, config.budget_mib),
            views,
        )
        server = {
            "w": params.clone(),
            "calibrator": calibrator,
            "memory": calibrator.remember(torch.zeros(0, views * len(params))),
            "history": self._new_history(),
            "mix": torch.full((len(calibrator.parts.banks),), config.mix),
            "draws": torch.randint(2**62, (), generator=generator),
        }
        if self._trains and any(True for _ in calibrator.parameters()):
            server["optimizer"] = torch.optim.Adam(calibrator.parameters(), lr=config.lr)
        return server

    @property
    def _views(self) -> int:
        return 2 if self.config.tokens == "both" else 1

    @property
    def _trains(self) -> bool:
        config = self.config
        heard = config.gain and (config.mix or config.held_out)  # whether the learner has, or may get, any say
        return bool(config.train != "none" and config.lr and heard)

    @property
    def _tokens_a_round(self) -> float:
        """Of a sequence: all clients', or on average one client's."""
        return self.task.cohort / (self.task.trainable if self.config.order == "per_client" else 1)

    @property
    def _capacity(self) -> int:
        """Most tokens in the history."""
        config, task = self.config, self.task
        return config.window * task.cohort if config.window else config.per_client * task.trainable

    @property
    def _longest(self) -> int:
        """Most tokens of one client in it: one a round."""
        return min(bound for bound in (self.config.window, self.config.per_client) if bound)

    def _new_history(self) -> History:
        config, d = self.config, self._views * self.task.layout.size
        rounds, each, budget_bytes = config.window or None, config.per_client or None, config.history_mib << 20
        return History(self._capacity, d, rounds=rounds, per_client=each, dtype=config.dtype, budget_bytes=budget_bytes)

    def init_client(self, params: Tensor) -> State:
        last = torch.zeros_like(params)
        return {"last": last} if self.config.tokens == "residual" else {"last": last, "update": last.clone()}

    def memory_bytes(self) -> int:
        config, d = self.config, self._views * self.task.layout.size
        history = History.memory_bytes(self._capacity, d, config.dtype, config.history_mib << 20)
        by_client, by_vjp = config.order == "per_client", self._trains and config.train in ("vjp", "both")
        # Read as they lie: fp32 without gaps, by the one learner that takes tokens in pieces. Else all are copied.
        in_place = config.dtype == "fp32" and config.learner == "ssm" and self._views == 1 and not config.per_client
        tokens = (0 if in_place else 1) + (4 if by_vjp else 0)  # arrays as large as all of them, and their gradients'
        states = 10 + (self.task.cohort * (3 if by_vjp else 1) if by_client else 0)
        arrays = 4 * d * (tokens * self._capacity + states * config.state_size)
        return history + arrays + 4 * (config.budget_mib << 20)

    # What clients are sent ---------------------------------------------------------------------------------------

    def broadcast(self, server: ServerState, ids: Tensor, rows: State) -> State:
        with torch.no_grad():
            return {"w": server["w"] + self._calibrations(server, server["memory"], ids, rows)}

    def _calibrations(self, server: ServerState, memory: Memories, ids: Tensor, rows: State) -> Tensor:
        """``c_i [C, d]``."""
        answers, mix = self._answers(server, memory, ids, rows), server["calibrator"].parts.spread(server["mix"])
        return torch.lerp(rows["last"], answers, mix) * (self.config.gain * self._mask)

    def _answers(self, server: ServerState, memory: Memories, ids: Tensor, rows: State) -> Tensor:
        """``|r_i| y_i / |y_i| [C, d]``: what the memory makes of a client's own last residual, at its length."""
        calibrator, last = server["calibrator"], rows["last"]
        each = self.config.order == "per_client"
        if each:
            memory = calibrator.remember_each(server["history"].sequences(ids, self._longest)[0])
        return calibrator.answers(memory, self._tokens(last, rows.get("update")), each, like=last)

    def _tokens(self, residual: Tensor, update: Tensor | None) -> Tensor:
        """Tokens, or queries: residuals, updates, or both side by side (``[C, 2 d]``)."""
        if update is None:
            return residual
        return update if self.config.tokens == "update" else torch.cat([residual, update], 1)

    @property
    def _mask(self) -> Tensor:
        masks = [self.task.layout.mask(group) for group in self.config.calibrated]
        return torch.stack(masks).any(0)

    def local_update(self, payload: State, rows: State, ctx: LocalContext) -> tuple[State, State]:
        w = payload["w"]
        if not self.config.held_out:
            return {"delta": ctx.sgd(w) - w}, rows
        kept, held = ctx.split(self.config.held_out)
        gradient = torch.zeros_like(w)  # of the mean loss; of a client that has nothing to hold out it stays zero
        for batch in held.batches(1):
            m, samples = batch.clients, batch.mask.sum(1, keepdim=True)
            gradient[:m] += samples / held.sizes[:m, None].clamp(min=1) * held.grad(w, batch)[:m]
        return {"delta": kept.sgd(w) - w, "gradient": gradient}, rows

    def personalise(self, payload: State, rows: State, ctx: LocalContext) -> Tensor:
        epochs = self.config.finetune_epochs
        return ctx.sgd(payload["w"], epochs=epochs) if epochs else payload["w"]

    # What the server learns --------------------------------------------------------------------------------------

    def aggregate(self, server: ServerState, cohort: Cohort, update: State, rows: State) -> tuple[ServerState, State]:
        start = time.perf_counter()
        delta = update["delta"]
        with torch.no_grad():  # before the learner's step: what the clients were sent
            calibrations = self._calibrations(server, server["memory"], cohort.ids, rows)
            mix = self._taught_mix(server, cohort, update["gradient"], rows) if self.config.held_out else server["mix"]
        losses = self._train(server, cohort, delta, rows)
        with torch.no_grad():
            trained = calibrations + delta  # v_i - w
            mean = cohort.mean(trained)
            residuals = trained - mean
            new_rows = {"last": residuals} if self.config.tokens == "residual" else {"last": residuals, "update": delta}
            # Within a round there is no time: by norm, not by id, so that renaming the clients changes nothing.
            order = residuals.norm(dim=1).argsort()
            tokens = server["calibrator"].arranged(self._tokens(residuals, new_rows.get("update")))
            new = tokens.index_select(0, order)
            server["history"].append(cohort.round, cohort.ids[order], new)
            held = server["history"].tokens()
            memory = self._remember(server, held, new)
            seconds = {"learner": time.perf_counter() - start}
            moments = server["optimizer"].state if "optimizer" in server else {}
            metrics = {
                **losses,
                **{f"mix_{b}": float(share) for b, share in enumerate(mix)},
                **self._attention(server, cohort, memory, held, tokens),
                "calibration_norm": float(calibrations.norm(dim=1).mean()),
                "residual_norm": float(residuals.norm(dim=1).mean()),
                "learner_mib": _nbytes([*server["calibrator"].parameters(), moments, memory]) / 2**20,
                "history_mib": server["history"].nbytes / 2**20,
                "history_tokens": float(len(server["history"])),
            }
        changed = {"w": server["w"] + mean, "memory": memory, "mix": mix, "metrics": metrics, "seconds": seconds}
        return {**server, **changed}, new_rows

    def _attention(
        self, server: ServerState, cohort: Cohort, memory: Memories, held: Tensor, tokens: Tensor
    ) -> dict[str, float]:
        """Shares of the cohort's own and of others' tokens in its answers, by age in rounds.

        ``memory``: after all tokens of the history, which are ``held``; ``tokens``: the cohort's.
        """
        if self.config.order == "per_client":
            return {}
        history, shares = server["history"], server["calibrator"].attention(memory, held, tokens)
        if shares is None:
            return {}
        own, age = cohort.ids[:, None] == history.clients(), cohort.round - history.rounds()
        ages = {"0": age == 0, "1_3": (age > 0) & (age < 4), "4": age >= 4}
        return {
            f"attention_{whose}_{name}": float((shares * (mask & of_an_age)).sum(1).mean())
            for whose, mask in {"own": own, "others": ~own}.items()
            for name, of_an_age in ages.items()
        }

    def _remember(self, server: ServerState, held: Tensor, new: Tensor) -> Memories:
        """The memory after all tokens that the history holds; streaming: after the new ones."""
        if self.config.order == "per_client":
            return server["memory"]  # read from the history, client by client, when they are sent something
        if self.config.streaming:
            return server["calibrator"].remember(new, server["memory"])
        return server["calibrator"].remember(held)

    def _taught_mix(self, server: ServerState, cohort: Cohort, gradient: Tensor, rows: State) -> Tensor:
        """The mix ``[B]`` of every bank of parts, a step against the gradient of the samples that were held out.

        The slope of client i's held-out loss is ``<answer_i - r_i, g_i>``. The step is ``mix_step`` times the mean
        slope over its standard error, and not more than that: small where clients disagree.
        """
        parts = server["calibrator"].parts
        change = self._answers(server, server["memory"], cohort.ids, rows) - rows["last"]
        direction = torch.nn.functional.normalize(gradient, dim=1)
        pairs = zip(parts.split(change), parts.split(direction), strict=True)
        slopes = torch.stack([(a * g).sum((0, 2)) for a, g in pairs])
        error = slopes.std(1, correction=0).clamp(min=1e-12) / slopes.shape[1] ** 0.5
        return (server["mix"] - self.config.mix_step * (slopes.mean(1) / error).clamp(-1, 1)).clamp(0, 1)

    def _train(self, server: ServerState, cohort: Cohort, delta: Tensor, rows: State) -> dict[str, float]:
        """One step of Adam on what ``train`` names; its value before the step."""
        if "optimizer" not in server or not len(server["history"]):
            return {}
        losses = {}
        if self.config.train in ("replay", "both"):
            losses["replay_loss"] = self._replay_loss(server, cohort.round)
        if self.config.train in ("vjp", "both"):
            losses["vjp_loss"] = -self._alignment(server, cohort, delta, rows)
        server["optimizer"].zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        server["optimizer"].step()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _replay_loss(self, server: ServerState, round: int) -> Tensor:
        """Teacher forcing: what a client's token asks is to be answered by the client's next token."""
        history, most, replay = server["history"], self.config.replay_tokens, server["calibrator"].replay_loss
        generator = torch.Generator().manual_seed(int(server["draws"]) + round)
        clients = history.clients()[-most:].tolist()
        if self.config.order == "per_client":
            newest = list(dict.fromkeys(reversed(clients)))[: max(1, most // self._longest)]
            sequences, _ = history.sequences(torch.tensor(newest), self._longest)
            positions = torch.arange(sequences.shape[1])
            written, asks, targets = positions >= 0, positions[:-1], positions[1:]
        else:
            sequences = history.tokens(most)[None]
            half = _half(clients, generator)
            written = torch.tensor([client not in half for client in clients])
            asks = (~written).nonzero()[:, 0]
            targets = _next_of_same(clients)[asks]
            if server["calibrator"].gives_back:
                asks, targets = asks[targets > asks], targets[targets > asks]
        return replay(sequences, written, asks, targets, self.config.replay_parts, generator)

    def _alignment(self, server: ServerState, cohort: Cohort, delta: Tensor, rows: State) -> Tensor:
        """``mean_i <c_i, u_i / |u_i|>``, over the mean length of ``r_i``."""
        each = self.config.order == "per_client"  # which reads the history itself
        memory = [] if each else server["calibrator"].remember(server["history"].tokens())
        calibrations = self._calibrations(server, memory, cohort.ids, rows)
        direction = torch.nn.functional.normalize(delta, dim=1)
        return (calibrations * direction).sum(1).mean() / rows["last"].norm(dim=1).mean().clamp(min=1e-12)


def _nbytes(values: Any) -> int:
    """Bytes of all tensors in nested lists and dicts."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    inside = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return sum(map(_nbytes, inside))


def _half(clients: list[int], generator: torch.Generator) -> set[int]:
    """Half of them, drawn by the order in which they appear: their names must not matter."""
    seen = list(dict.fromkeys(clients))
    return {seen[k] for k in torch.randperm(len(seen), generator=generator)[: len(seen) // 2].tolist()}


def _next_of_same(clients: list[int]) -> Tensor:
    """``[L] int64``: where each token's client has its next one; the token itself, where it is the client's newest."""
    following: dict[int, int] = {}
    places = []
    for at in reversed(range(len(clients))):
        places.append(following.get(clients[at], at))
        following[clients[at]] = at
    return torch.tensor(places[::-1])
