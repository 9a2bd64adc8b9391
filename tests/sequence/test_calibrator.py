"""Learners over the parts of a row: by hand with learners that only copy or average, and what holds for all."""

import pytest
import torch

from fedsim.layout import Layout
from fedsim.sequence import LEARNERS, make_learner
from fedsim.sequence.calibrator import Calibrator
from fedsim.sequence.parts import Parts

LAYOUT = Layout.of([("a.x", (3,), "adapter"), ("head.weight", (1, 2), "head"), ("head.bias", (2,), "head")])


def _calibrator(name: str, views: int = 1, state_size: int = 3) -> Calibrator:
    generator = torch.Generator().manual_seed(0)
    return Calibrator(Parts.of(LAYOUT), lambda k: make_learner(name, k, state_size, generator, 10.0, None), views)


def _tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_of_the_tokens_at_the_querys_length():
    calibrator = _calibrator("mean")
    #                        a        head: classes are columns (weight, bias)
    tokens = torch.tensor([[3.0, 0, 0, 1, 0, 1, 2], [1.0, 0, 0, 3, 0, 3, 2]])
    query = torch.tensor([[0.0, 3, 4, 1, 0, 0, 5]])
    memories = calibrator.remember(calibrator.arranged(tokens))
    answers = calibrator.answers(memories, query)
    torch.testing.assert_close(answers, torch.tensor([[2.0, 0, 0, 2, 0, 2, 2]]))
    # Lengths of the query's parts: 5, then 1 for class 0 (1, 0), and 5 for class 1 (0, 5).
    half = 0.5**0.5
    expected = torch.tensor([[5.0, 0, 0, half, 0, half, 5]])
    torch.testing.assert_close(calibrator.answers(memories, query, like=query), expected)
    torch.testing.assert_close(calibrator.answers(memories, query, like=2 * query), 2 * expected)


def test_where_the_memory_says_nothing_the_query_stays():
    calibrator, query = _calibrator("ssm"), _tokens(2, 7)
    memories = calibrator.remember(query[:0])
    assert torch.equal(calibrator.answers(memories, query), torch.zeros(2, 7))
    assert torch.equal(calibrator.answers(memories, query, like=query), query)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", LEARNERS)
def test_each_client_may_have_a_memory_of_its_own(name, views):
    calibrator, sequences, query = _calibrator(name, views), _tokens(4, 5, 7 * views), _tokens(4, 7 * views, seed=2)
    sequences *= torch.tensor([1.0, 30.0, 0.02, 1.0])[:, None, None]  # whoever else is asked, has no say in it
    sequences[3, :3] = 0  # a short past, empty places in front
    with torch.no_grad():
        for parameter in calibrator.parameters():
            parameter.add_(0.1)  # so that none only copies
        together = calibrator.answers(calibrator.remember_each(sequences), query, each=True)
        assert together.shape == (4, 7)
        for i in range(4):
            own = calibrator.remember_each(sequences[i : i + 1])
            torch.testing.assert_close(calibrator.answers(own, query[i : i + 1], each=True), together[i : i + 1])
        for i in range(3):  # without empty places: as a sequence of all clients that has no others
            shared = calibrator.answers(calibrator.remember(sequences[i]), query[i : i + 1])
            torch.testing.assert_close(shared, together[i : i + 1])
        # The two tokens' own size, not that of the empty places.
        scales = [bank["scale"] for bank in calibrator.remember_each(sequences[3:])]
        for scale, bank in zip(scales, calibrator.remember(sequences[3, 3:]), strict=True):
            torch.testing.assert_close(scale.squeeze(), bank["scale"])


@pytest.mark.parametrize("name", LEARNERS)
def test_the_unit_of_the_tokens_does_not_matter(name):
    calibrator, tokens, query = _calibrator(name), _tokens(6, 7), _tokens(2, 7, seed=2)
    with torch.no_grad():
        for parameter in calibrator.parameters():
            parameter.add_(0.1)
        answers = calibrator.answers(calibrator.remember(tokens), query, like=query)
        scaled = calibrator.answers(calibrator.remember(1000 * tokens), 1000 * query, like=query)
    torch.testing.assert_close(answers, scaled)


def _rebuild(calibrator: Calibrator, tokens: torch.Tensor, asked: torch.Tensor, share: float = 1.0, seed: int = 0):
    asks, arranged = asked.nonzero()[:, 0], calibrator.arranged(tokens)
    return calibrator.replay_loss(arranged[None], ~asked, asks, asks, share, torch.Generator().manual_seed(seed))


def test_replay_by_hand():
    tokens = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [0.0, 2, 0, 1, 1, 0, 0], [3.0, 4, 0, 2, -2, 0, 0]])
    # Token 0 asks an empty memory: cos = 0, of length 1 in part a only. Token 2 asks token 1: in a cos = 4 / 5 at
    # length 5, in class 0 cos = 1 and in class 1 cos = -1, both at length 2: (1 + 5 / 5 + 0 + 2 * 2) / (1 + 5 + 2 + 2)
    loss = _rebuild(_calibrator("mean"), tokens, torch.tensor([True, False, True]))
    torch.testing.assert_close(loss.item(), 0.6)


def test_replay_of_pairs_by_hand():
    # One client's sequences, an empty place in front: token 1 is to foretell token 2, by giving itself back.
    tokens = torch.zeros(1, 3, 7)
    tokens[0, 1, :2], tokens[0, 2, :2] = torch.tensor([2.0, 0]), torch.tensor([3.0, 4])
    pairs = torch.tensor([0, 1]), torch.tensor([1, 2])
    loss = _calibrator("last").replay_loss(tokens, torch.ones(3) > 0, *pairs, 1.0, torch.Generator())
    torch.testing.assert_close(loss.item(), 1 - 3 / 5)


def test_replay_draws_some_of_the_parts():
    calibrator, tokens, asked = _calibrator("mean"), _tokens(6, 7), torch.arange(6) % 2 == 1
    losses = {round(_rebuild(calibrator, tokens, asked, 0.5, seed).item(), 6) for seed in range(20)}
    assert len(losses) == 2  # either class, and the one adapter


@pytest.mark.parametrize("name", ["ssm", "ssd", "lstm", "gru", "mlp", "transformer"])
def test_replay_trains_every_learner(name):
    calibrator, directions = _calibrator(name, state_size=8), _tokens(3, 7)
    # Three kinds of clients; the next token of each is the opposite of this one: nobody's own token tells that.
    tokens = torch.stack([directions.repeat(10, 1), -directions.repeat(10, 1)]).flatten(0, 1)[None]
    tokens = tokens + 0.1 * _tokens(1, 60, 7, seed=2)
    asks = torch.arange(3, 30, 2)
    optimiser = torch.optim.Adam(calibrator.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        loss = calibrator.replay_loss(
            tokens, torch.arange(60) % 2 == 0, asks, asks + 30, 1.0, torch.Generator().manual_seed(0)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.8
