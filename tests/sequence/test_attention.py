"""The transformer block: two tokens by hand, its start, its laws."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fedsim.sequence.attention import Transformer

WRITTEN = torch.tensor([True, False, True, True, False, True])


def _tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _learner(speaks: bool = True, state_size: int = 4, seed: int = 0) -> Transformer:
    learner = Transformer(6, state_size, torch.Generator().manual_seed(seed))
    if speaks:
        with torch.no_grad():
            learner.W_up.copy_(_tokens(state_size, 6, seed=3))
    return learner


def test_two_tokens_by_hand():
    learner = Transformer(1, 2, torch.Generator())
    with torch.no_grad():
        for weight in (learner.W_Q, learner.W_2):
            weight.zero_()  # then scores are ages alone, and the MLP adds nothing
        for weight in (learner.W_V, learner.W_O):
            weight.copy_(torch.eye(2))
        learner.W_down.copy_(torch.tensor([[1.0, -1.0]]))  # LN(e) = sign(token) (1, -1)
        learner.W_up.copy_(torch.tensor([[10.0], [0.0]]))
    answer = learner.read(learner.remember(torch.tensor([[[300.0], [-200.0]]])), torch.tensor([[[0.5]]])).item()
    # One head: slope 1 / 16, ages 2 and 1, the zero token 1.
    older, newer = math.exp(-2 / 16), math.exp(-1 / 16)
    expected = 0.5 + 10 * (0.5 + (older - newer) / (1 + older + newer))
    torch.testing.assert_close(answer, expected, atol=0, rtol=1e-6)


def test_attention_by_hand():
    learner = Transformer(1, 2, torch.Generator())
    with torch.no_grad():
        learner.W_Q.zero_()  # scores are ages alone
    tokens, query = torch.tensor([[[300.0], [-200.0]]]), torch.tensor([[[0.5], [7.0]]])
    older, newer = math.exp(-2 / 16), math.exp(-1 / 16)
    expected = torch.tensor([older, newer]) / (1 + older + newer)
    torch.testing.assert_close(learner.attention(tokens, query), expected.expand(1, 2, 2))


def test_attention_is_torchs():
    """Against values that are the tokens' own names, what is found are the weights."""
    learner, tokens, query = _learner(state_size=4), _tokens(3, 6, 6), _tokens(3, 2, 6, seed=2)
    e = learner.remember(tokens)["e"]
    q, key = learner._keys(query @ learner.W_down, e)
    names = torch.eye(7).expand(3, 1, 7, 7)  # the zero token's first
    found = scaled_dot_product_attention(q, key, names, learner._bias(torch.tensor([6, 6]), e))
    torch.testing.assert_close(learner.attention(tokens, query), found[:, 0, :, 1:])


def test_heads_share_the_state_evenly():
    assert [_learner(state_size=n).num_heads for n in (1, 16, 32, 50, 64)] == [1, 1, 2, 2, 4]


def test_starts_by_giving_the_query_back():
    learner, tokens = _learner(speaks=False), _tokens(3, 6, 6)
    assert torch.equal(learner(tokens, WRITTEN), tokens)
    assert torch.equal(learner.read(learner.remember(tokens), tokens[:, :2]), tokens[:, :2])


@pytest.mark.parametrize("state_size", [4, 32])
def test_a_token_asks_what_was_written_before_it(state_size):
    learner, tokens = _learner(state_size=state_size).double(), _tokens(3, 6, 6).double()
    answers = learner(tokens, WRITTEN)
    for j in range(6):
        memory = learner.remember(tokens[:, :j][:, WRITTEN[:j]])
        torch.testing.assert_close(answers[:, j], learner.read(memory, tokens[:, j : j + 1])[:, 0])


def test_a_token_that_is_not_written_leaves_no_trace():
    learner, tokens = _learner(), _tokens(3, 6, 6)
    others = torch.where(WRITTEN[:, None], tokens, math.nan)
    assert torch.equal(learner(tokens, WRITTEN)[:, WRITTEN], learner(others, WRITTEN)[:, WRITTEN])


def test_queries_do_not_see_each_other():
    learner, tokens = _learner(), _tokens(3, 6, 6)
    memory = learner.remember(tokens)
    before = memory["e"].clone()
    together = learner.read(memory, tokens)
    alone = [learner.read(memory, q) for q in tokens.split(1, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1))
    assert torch.equal(memory["e"], before)


def test_order_matters():
    learner, tokens = _learner().double(), _tokens(3, 6, 6).double()
    forth, back = (learner.read(learner.remember(t), tokens[:, :1]) for t in (tokens, tokens.flip(1)))
    assert (forth - back).abs().max() > 1e-3


def test_every_parameter_learns_once_it_speaks():
    learner = _learner()
    learner(_tokens(3, 6, 6), WRITTEN).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in learner.parameters())


@pytest.mark.parametrize("shape", [(0, 6, 6), (3, 0, 6), (0, 0, 6)])
def test_no_sequences_or_no_tokens(shape):
    learner, tokens = _learner(), _tokens(*shape)
    assert learner(tokens, WRITTEN[: shape[1]]).shape == shape
    query = _tokens(shape[0], 2, 6)
    assert learner.read(learner.remember(tokens), query).isfinite().all()
    assert learner.read(learner.remember(tokens), query[:, :0]).shape == (shape[0], 0, 6)


def test_the_generator_draws_all():
    before = torch.get_rng_state()
    one, same, other = (_learner(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.W_Q, other.W_Q)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(_tokens(3, 6, 6), WRITTEN), other(_tokens(3, 6, 6), WRITTEN))
