"""Batches, gradients and local training of a block, on a model small enough for a pencil.

The model: an image is one number x (its red), a row is one weight a class, the logits are ``x w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.config import LocalConfig
from fedsim.env import FederatedData, Ragged
from fedsim.local import Batch, LocalContext, client_mean, cross_entropy
from fedsim.plan import prepare
from fedsim.samples import Samples
from fedsim.simulator import Simulator

# Client k's images are 10 k, 10 k + 1, …; an image's red is its index. Two to a batch: 3, 2 and 1 steps.
SIZES, TEST_SIZES = (5, 3, 2), (2, 3, 1)
EVERYONE = (0, 1, 2)
LN2 = math.log(2)
CPU = torch.device("cpu")


class Pencil:
    """Stands in for ``VitModel``."""

    device = CPU

    def features(self, rows: Tensor, images: Tensor) -> Tensor:
        return images[:, :, 0, :, 0].float()

    def logits(self, rows: Tensor, images: Tensor) -> Tensor:
        return self.features(rows, images) * rows[:, None, :]


@pytest.fixture
def data(tmp_path: Path) -> FederatedData:
    pixels = np.arange(30, dtype=np.uint8).repeat(3).reshape(30, 3, 1, 1)
    np.save(tmp_path / "images.npy", pixels)
    train = Ragged.of([10 * k + np.arange(size) for k, size in enumerate(SIZES)])
    test = Ragged.of([10 * k + 9 - np.arange(size) for k, size in enumerate(TEST_SIZES)])
    return FederatedData(tmp_path / "images.npy", np.arange(30) % 2, ("even", "odd"), train, test)


@pytest.fixture
def context(data: FederatedData) -> Callable[..., LocalContext]:
    def made(
        ids: tuple[int, ...] = EVERYONE, seed: int = 0, round: int = 0, purpose: str = "train", **local: Any
    ) -> LocalContext:
        settings = replace(LocalConfig(epochs=1, batch_size=2, lr=0.01), **local)
        model: Any = Pencil()
        return LocalContext(model, Samples(data, CPU), ids, settings, seed, round, purpose)

    return made


Make = Callable[..., LocalContext]


def drawn(batches: Any, client: int) -> list[list[int]]:
    """The images of one client of the block, batch after batch."""
    return [
        batch.inputs[client, batch.mask[client] == 1, 0, 0, 0].tolist() for batch in batches if client < batch.clients
    ]


def joined(parts: list[list[int]]) -> list[int]:
    return [image for part in parts for image in part]


# Batches ---------------------------------------------------------------------------------------------------------


def test_clients_leave_early_and_partial_batches_are_masked(context: Make) -> None:
    batches = list(context().batches())
    assert [batch.clients for batch in batches] == [3, 2, 1]
    assert [batch.mask.tolist() for batch in batches] == [[[1, 1], [1, 1], [1, 1]], [[1, 1], [1, 0]], [[1]]]
    assert [batch.inputs.shape for batch in batches] == [(3, 2, 3, 1, 1), (2, 2, 3, 1, 1), (1, 1, 3, 1, 1)]


def test_an_epoch_is_every_sample_of_a_client_once_with_its_label(context: Make) -> None:
    batches = list(context().batches())
    for k, size in enumerate(SIZES):
        assert sorted(joined(drawn(batches, k))) == [10 * k + i for i in range(size)]
    for batch in batches:
        assert torch.equal(batch.labels * batch.mask, batch.inputs[:, :, 0, 0, 0] % 2 * batch.mask)


def test_every_epoch_is_shuffled_anew(context: Make) -> None:
    alone = drawn(context((0,)).batches(epochs=20), 0)
    epochs = [tuple(joined(alone[i : i + 3])) for i in range(0, 60, 3)]
    assert len(epochs) == 20 and all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 15  # of 120 orders


def test_a_second_pass_goes_on_where_the_first_ended(context: Make) -> None:
    ctx = context((0,))
    first, second = drawn(ctx.batches(), 0), drawn(ctx.batches(), 0)
    assert first != second
    assert first + second == drawn(context((0,)).batches(epochs=2), 0)


def test_what_a_client_draws_does_not_depend_on_the_block(context: Make) -> None:
    together = list(context().batches(epochs=2))
    for k in EVERYONE:
        assert drawn(together, k) == drawn(context((k,)).batches(epochs=2), 0)


@pytest.mark.parametrize("other", [{"seed": 1}, {"round": 1}, {"purpose": "personalise"}])
def test_seed_round_and_purpose_change_the_order(context: Make, other: dict[str, Any]) -> None:
    assert drawn(context((0,)).batches(epochs=4), 0) != drawn(context((0,), **other).batches(epochs=4), 0)


def test_the_test_split_comes_in_order_whatever_the_sizes(context: Make) -> None:
    ctx = context()
    batches = list(ctx.batches(split="test"))
    assert [drawn(batches, k) for k in EVERYONE] == [[[9, 8], []], [[19, 18], [17]], [[29]]]
    assert [batch.mask.tolist() for batch in batches] == [[[1, 1], [1, 1], [1, 0]], [[0], [1]]]
    assert drawn(ctx.batches(split="test", batch_size=8), 1) == [[19, 18, 17]]


def test_epochs_and_batch_size_default_to_the_settings(context: Make) -> None:
    assert len(list(context(epochs=2).batches())) == 6
    assert len(list(context(epochs=2).batches(epochs=0))) == 0
    assert [batch.mask.shape for batch in context().batches(batch_size=4)] == [(3, 4), (1, 1)]


def test_other_splits_are_refused(context: Make) -> None:
    with pytest.raises(ValueError, match="split 'valid' is neither 'train' nor 'test'"):
        next(context().batches(split="valid"))


def images_of(ctx: LocalContext, client: int) -> list[int]:
    return sorted(joined(drawn(ctx.batches(), client)))


def test_a_part_of_the_samples_is_held_out(context: Make) -> None:
    kept, held = context().split(0.2)  # of 5, 3 and 2 samples one each
    assert kept.sizes.tolist() == [4, 2, 1] and held.sizes.tolist() == [1, 1, 1]
    for k, size in enumerate(SIZES):
        assert sorted(images_of(kept, k) + images_of(held, k)) == [10 * k + i for i in range(size)]
    assert [ctx.sizes.tolist() for ctx in context().split(0.9)] == [[1, 1, 1], [4, 2, 1]]
    assert context().split(0.2)[0].class_counts().sum(1).tolist() == [4, 2, 1]


def test_the_held_out_part_is_that_of_the_client_and_of_the_seed(context: Make) -> None:
    def held(**more: Any) -> list[int]:
        return [images_of(context(**more).split(0.4)[1], k) for k in range(len(more.get("ids", EVERYONE)))]

    assert held() == held(round=7) == held(purpose="personalise")
    assert held(ids=(2, 0)) == [held()[2], held()[0]]
    assert any(held() != held(seed=seed) for seed in range(1, 5))


def test_renaming_clients_holds_out_the_same_samples(context: Make, data: FederatedData) -> None:
    renamed = replace(data, train=Ragged.of([data.train[k] for k in (2, 0, 1)]))
    model: Any = Pencil()
    ctx = LocalContext(model, Samples(renamed, CPU), EVERYONE, LocalConfig(batch_size=2), 0, 0, "train")
    assert [images_of(ctx.split(0.4)[1], k) for k in (1, 2, 0)] == [
        images_of(context().split(0.4)[1], k) for k in EVERYONE
    ]


def test_a_single_sample_is_never_held_out(data: FederatedData) -> None:
    poor = replace(data, train=Ragged.of([np.array([4]), np.array([5, 6]), np.array([], dtype=np.int64)]))
    model: Any = Pencil()
    kept, held = LocalContext(model, Samples(poor, CPU), EVERYONE, LocalConfig(batch_size=2), 0, 0, "train").split(0.5)
    assert kept.sizes.tolist() == [1, 1, 0] and held.sizes.tolist() == [0, 1, 0]
    assert [batch.left.tolist() for batch in held.batches()] == [[0]]


def test_losses_of_both_parts_count_for_the_client(context: Make) -> None:
    ctx = context()
    kept, held = ctx.split(0.2)
    kept.sgd(torch.zeros(1, 2))
    assert ctx.loss_count.tolist() == [4, 2, 1] and ctx.steps.tolist() == [2, 1, 1]
    held.sgd(torch.zeros(1, 2))
    assert ctx.loss_count.tolist() == [5, 3, 2]


def test_class_counts(context: Make) -> None:
    # Images 0 … 4, 10 … 12, 20 and 21; an image's class is whether it is odd.
    assert context().class_counts().tolist() == [[3, 2], [2, 1], [1, 1]]
    assert context((2, 1)).class_counts().tolist() == [[1, 1], [2, 1]]


def test_generators_belong_to_clients(context: Make) -> None:
    def first(generators: list[torch.Generator]) -> list[float]:
        return [torch.rand(1, generator=one).item() for one in generators]

    block = first(context().generator("noise"))
    assert len(set(block)) == 3
    assert block[2:] == first(context((2,)).generator("noise"))
    assert not set(block) & set(first(context().generator("other")) + first(context(round=1).generator("noise")))


# Losses and gradients --------------------------------------------------------------------------------------------


def batch_of(values: list[list[int]], labels: list[list[int]], mask: list[list[int]]) -> Batch:
    x = torch.tensor(values, dtype=torch.uint8)
    images = x[:, :, None, None, None].expand(-1, -1, 3, 1, 1)
    return Batch(images, torch.tensor(labels), torch.tensor(mask, dtype=torch.float32))


# At w = 0 both classes have probability 1/2: the gradient of one sample is x (1/2 - [y = class]).
TWO = batch_of([[2, 4], [6, 250]], [[0, 1], [1, 0]], [[1, 1], [1, 0]])


def test_cross_entropy_and_mean_over_real_samples() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])
    losses = cross_entropy(logits, torch.tensor([[0, 1]]))
    torch.testing.assert_close(losses, torch.tensor([[LN2, math.log(4 / 3)]]))
    means = client_mean(torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert means.tolist() == [2.0, 5.0]
    assert client_mean(torch.tensor([[7.0, 8.0]]), torch.zeros(1, 2)).tolist() == [0.0]


def test_loss_is_each_clients_mean(context: Make) -> None:
    torch.testing.assert_close(context().loss(torch.zeros(1, 2), TWO), torch.tensor([LN2, LN2]))
    # Client 0 at w = (1, 0): samples 2 and 4 with labels 0 and 1
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(4))) / 2
    assert context().loss(torch.tensor([[1.0, 0.0]]), TWO)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_grad_by_hand_and_zero_for_those_who_left(context: Make, rows: int) -> None:
    gradient = context().grad(torch.zeros(rows, 2), TWO)
    # Client 0: ((-1, 1) + (2, -2)) / 2.  Client 1: (3, -3); its padding does not count.  Client 2 has left.
    assert gradient.tolist() == [[0.5, -0.5], [3.0, -3.0], [0.0, 0.0]]


def test_grad_of_an_algorithms_own_loss(context: Make) -> None:
    ctx = context()
    gradient = ctx.grad(torch.ones(3, 2), TWO, lambda w, batch: (w**2).sum(1) * torch.tensor([1.0, 5.0]))
    assert gradient.tolist() == [[2.0, 2.0], [10.0, 10.0], [0.0, 0.0]]


def test_a_client_that_ran_out_before_one_after_it_has_no_gradient(context: Make) -> None:
    ctx = context((2, 0))  # 2 and 5 samples: not the order that a plan would give them
    gradients = [ctx.grad(torch.zeros(1, 2), batch) for batch in ctx.batches()]
    assert [gradient[0].any().item() for gradient in gradients] == [True, False, False]
    assert all(gradient[1].any() for gradient in gradients)


def test_features_and_logits_take_own_or_shared_rows(context: Make) -> None:
    ctx, own = context(), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert ctx.logits(own, TWO)[:, 0].tolist() == [[2.0, 4.0], [18.0, 24.0]]
    assert ctx.logits(own[:1], TWO)[:, 0].tolist() == [[2.0, 4.0], [6.0, 12.0]]
    assert ctx.features(own, TWO).tolist() == [[[2.0], [4.0]], [[6.0], [250.0]]]


def test_facts_of_losses_and_steps(context: Make) -> None:
    ctx = context()
    ctx.grad(torch.zeros(1, 2), TWO)
    assert ctx.steps.tolist() == [1, 1, 0] and ctx.loss_count.tolist() == [2, 1, 0]
    torch.testing.assert_close(ctx.loss_sum, torch.tensor([2 * LN2, LN2, 0.0]))
    ctx.grad(torch.zeros(1, 2), TWO, lambda w, batch: w.sum(1) + 10.0)
    assert ctx.steps.tolist() == [2, 2, 0]
    torch.testing.assert_close(ctx.loss_sum, torch.tensor([2 * LN2 + 20.0, LN2 + 10.0, 0.0]))


def test_facts_of_local_training(context: Make) -> None:
    ctx = context(lr=0.0)
    ctx.sgd(torch.zeros(1, 2), epochs=2)
    assert ctx.sizes.tolist() == [5, 3, 2]
    assert ctx.steps.tolist() == [6, 4, 2] and ctx.loss_count.tolist() == [10, 6, 4]
    torch.testing.assert_close(ctx.loss_sum / ctx.loss_count, torch.full((3,), LN2))


# Local training --------------------------------------------------------------------------------------------------


def plain(ctx: LocalContext, w0: Tensor, momentum: float, decay: float, mask: Tensor, mu: float, epochs: int) -> Tensor:
    """One client's training as a textbook has it: penalties are losses, autograd does the rest."""
    w, velocity = w0.clone(), torch.zeros_like(w0)
    for images in drawn(ctx.batches(epochs), 0):
        w.requires_grad_()
        x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(images) % 2
        penalty = decay / 2 * w.square().sum() + mu / 2 * (w - w0).square().sum()
        (gradient,) = torch.autograd.grad(F.cross_entropy(x[:, None] * w, y) + penalty, w)
        velocity = momentum * velocity + gradient * mask
        w = w.detach() - 0.01 * velocity
    return w


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"decay": 0.3},
        {"masked": True},
        {"mu": 2.0},
        {"momentum": 0.5, "decay": 0.3, "masked": True, "mu": 2.0},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("client", EVERYONE)
def test_sgd_is_the_plain_loop(context: Make, options: dict[str, Any], client: int) -> None:
    momentum, decay, mu = (options.get(key, 0.0) for key in ("momentum", "decay", "mu"))
    mask = torch.tensor([True, not options.get("masked")])
    w0 = torch.tensor([[0.3, -0.2], [0.1, 0.0], [-0.4, 0.5]])
    got = context(momentum=momentum, weight_decay=decay).sgd(
        w0,
        epochs=2,
        mask=mask if options.get("masked") else None,
        pull=(lambda w: mu * (w - w0)) if mu else None,
    )
    expected = plain(context((client,)), w0[client], momentum, decay, mask, mu, epochs=2)
    torch.testing.assert_close(got[client], expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(got[client], w0[client])


def test_sgd_one_step_by_hand(context: Make, data: FederatedData) -> None:
    # Client 2 holds images 20 (even) and 21 (odd): at w = 0 its gradient is ((-10, 10) + (10.5, -10.5)) / 2.
    trained = context((2,), lr=0.5).sgd(torch.zeros(1, 2))
    assert trained.tolist() == [[-0.125, 0.125]]


def test_sgd_leaves_what_is_outside_the_mask(context: Make) -> None:
    w = torch.tensor([[0.3, -0.2]])
    trained = context(momentum=0.9, weight_decay=0.5).sgd(w, mask=torch.tensor([False, True]), pull=torch.ones_like)
    assert trained[:, 0].tolist() == [w[0, 0].item()] * 3
    assert (trained[:, 1] != w[0, 1]).all()


def test_sgd_leaves_its_input_and_starts_shared_rows_alike(context: Make) -> None:
    shared = torch.tensor([[0.3, -0.2]])
    before = shared.clone()
    trained = context().sgd(shared)
    assert torch.equal(shared, before)
    assert trained.shape == (3, 2) and not trained.requires_grad
    assert torch.equal(trained, context().sgd(shared.expand(3, -1).clone()))


def test_sgd_epochs_default_to_the_settings(context: Make) -> None:
    w = torch.zeros(1, 2)
    assert torch.equal(context(epochs=3).sgd(w), context().sgd(w, epochs=3))
    assert torch.equal(context(epochs=3).sgd(w, epochs=0), w.expand(3, -1))


# Optimisers ------------------------------------------------------------------------------------------------------


def by_torch(ctx: LocalContext, w0: Tensor, epochs: int, mask: Tensor, mu: float) -> Tensor:
    """One client's training by ``torch.optim``; what the mask leaves out is no parameter at all."""
    local = ctx.local
    frozen, w = w0[~mask], w0[mask].clone().requires_grad_()
    settings: dict[str, Any] = {"lr": local.lr, "weight_decay": local.weight_decay}
    if local.optimizer == "sgd":
        optimiser: Any = torch.optim.SGD([w], momentum=local.momentum, **settings)
    else:
        found = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[local.optimizer]
        optimiser = found([w], betas=local.betas, eps=local.eps, **settings)

    def row() -> Tensor:
        return torch.zeros(2).masked_scatter(mask, w).masked_scatter(~mask, frozen)

    for images in drawn(ctx.batches(epochs), 0):
        x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(images) % 2
        optimiser.zero_grad()
        (F.cross_entropy(x[:, None] * row(), y) + mu / 2 * (row() - w0).square().sum()).backward()
        if local.clip:
            torch.nn.utils.clip_grad_norm_([w], local.clip)
        optimiser.step()
    return row().detach()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.3},
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 0.1},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 0.1},
        {"optimizer": "sgd", "clip": 1.5},
        {"optimizer": "sgd", "clip": 0.5, "momentum": 0.9, "weight_decay": 0.3},
        {"optimizer": "adamw", "clip": 0.5, "weight_decay": 0.3},
    ],
    ids=lambda options: "+".join(str(value) for value in options.values()),
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mu", [0.0, 2.0], ids=["free", "pulled"])
def test_a_block_is_torchs_optimiser_client_by_client(
    context: Make, options: dict[str, Any], masked: bool, mu: float
) -> None:
    mask = torch.tensor([not masked, True])
    w0 = torch.tensor([[0.3, -0.2], [0.1, 0.0], [-0.4, 0.5]])
    got = context(**options).sgd(
        w0, epochs=3, mask=mask if masked else None, pull=(lambda w: mu * (w - w0)) if mu else None
    )
    for client in EVERYONE:
        expected = by_torch(context((client,), **options), w0[client], 3, mask, mu)
        torch.testing.assert_close(got[client], expected, atol=2e-6, rtol=2e-6)
    assert not torch.equal(got, w0)


@pytest.mark.parametrize("options", [{"momentum": 0.9, "weight_decay": 0.3}, {"optimizer": "adamw"}])
def test_a_client_that_left_before_one_after_it_stays_as_it_is(context: Make, options: dict[str, Any]) -> None:
    w0 = torch.tensor([[-0.4, 0.5], [0.3, -0.2]])
    ctx = context((2, 0), **options)  # 1 and 3 steps an epoch: not the order that a plan would give them
    got = ctx.sgd(w0, epochs=2, pull=torch.ones_like)
    assert ctx.steps.tolist() == [2, 6]
    for place, client in enumerate((2, 0)):
        alone = context((client,), **options).sgd(w0[place : place + 1], epochs=2, pull=torch.ones_like)
        torch.testing.assert_close(got[place], alone[0])


def test_clipping_by_hand(context: Make) -> None:
    # Client 2's gradient at zero is (0.25, -0.25), of norm 0.35; client 1's two are far longer than 0.5.
    small = context((2,), lr=1.0, clip=0.5).sgd(torch.zeros(1, 2))
    assert small.tolist() == [[-0.25, 0.25]]
    long = context((1,), lr=1.0, clip=0.5, batch_size=3).sgd(torch.zeros(1, 2))
    torch.testing.assert_close(long.norm(), torch.tensor(0.5))


def test_training_on_an_algorithms_own_loss(context: Make) -> None:
    # 1/2 |w - 1|^2, three, two and one steps of rate 1/2: the distance to 1 is halved at each.
    trained = context(lr=0.5).sgd(torch.zeros(1, 2), loss=lambda w, batch: (w - 1).square().sum(1) / 2)
    assert trained.tolist() == [[0.875, 0.875], [0.75, 0.75], [0.5, 0.5]]


# The learning rate over rounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.8] * 5),
        ({"schedule": "cosine"}, [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5))]),
        ({"schedule": "step", "step_rounds": 2, "step_factor": 0.25}, [0.8, 0.8, 0.2, 0.2, 0.05]),
    ],
)
def test_schedules_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    local = LocalConfig(lr=0.8, **settings)
    assert [local.in_round(round, 4).lr for round in range(len(expected))] == pytest.approx(expected)
    assert local.in_round(0, 4) == local


def test_a_context_has_the_learning_rate_of_its_round(context: Make) -> None:
    assert context(lr=0.25).lr == 0.25


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"betas": (0.9,)}, "betas [0.9] are not two numbers below 1"),
        ({"betas": (0.9, 1.0)}, "betas [0.9, 1.0] are not two numbers below 1"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum is for sgd; adam has betas"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        LocalConfig(**settings)
    assert str(caught.value) == told


def test_the_simulator_gives_it_the_rate_of_the_schedule(tiny_config: Callable[..., Any]) -> None:
    plan = prepare(tiny_config("local.lr=0.4", "local.schedule=step", "local.step_rounds=1", "rounds=3"))
    rates = [Simulator(plan.workload)._context(round, (0,), "train").lr for round in range(3)]
    assert rates == pytest.approx([0.4, 0.2, 0.1])


class _Waits(TorchDispatchMode):
    """Operations that read a number out of a tensor: on a GPU the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_local_training_never_waits_for_the_device(tiny_config: Callable[..., Any], optimizer: str) -> None:
    plan = prepare(tiny_config(f"local.optimizer={optimizer}", "local.clip=1", "local.weight_decay=0.1"))
    ctx = Simulator(plan.workload)._context(0, (0, 1, 2), "train")
    w = plan.params[None]
    with _Waits() as waits:
        trained = ctx.sgd(w, epochs=2, pull=lambda x: 0.1 * (x - w), mask=plan.workload.task.layout.mask("adapter"))
    assert not waits.names and not torch.equal(trained[0], trained[1])
    with _Waits() as waits:
        float(trained.sum())
    assert waits.names  # they would be seen
