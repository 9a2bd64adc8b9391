"""Last and Mean, by hand, and their laws."""

import math

import pytest
import torch

from fedsim.sequence.fixed import Last, Mean

TOKENS = torch.tensor([[1.0, 10.0], [math.nan, math.nan], [3.0, 20.0], [8.0, 60.0]])[None]
WRITTEN = torch.tensor([True, False, True, True])


def test_last_is_the_query():
    learner = Last(2, 4, torch.Generator())
    assert learner(TOKENS, WRITTEN) is TOKENS
    assert torch.equal(learner.read(learner.remember(TOKENS), TOKENS[:, 2:]), TOKENS[:, 2:])


def test_a_mean_is_of_all_tokens_alike():
    mean = Mean(2, 1, torch.Generator())
    assert torch.equal(mean.attention(torch.ones(3, 4, 2), torch.ones(3, 5, 2)), torch.full((3, 5, 4), 0.25))
    assert mean.attention(torch.ones(3, 0, 2), torch.ones(3, 5, 2)).shape == (3, 5, 0)


def test_mean_of_what_was_written_before():
    learner = Mean(2, 4, torch.Generator())
    assert learner(TOKENS, WRITTEN).tolist() == [[[0.0, 0.0], [1.0, 10.0], [1.0, 10.0], [2.0, 15.0]]]
    answers = learner.read(learner.remember(TOKENS[:, WRITTEN]), TOKENS[:, :2])
    assert answers.tolist() == [[[4.0, 30.0], [4.0, 30.0]]]


@pytest.mark.parametrize("kind", [Last, Mean])
def test_a_token_asks_what_was_written_before_it(kind):
    learner = kind(6, 4, torch.Generator())
    tokens = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    answers = learner(tokens, WRITTEN)
    for j in range(4):
        memory = learner.remember(tokens[:, :j][:, WRITTEN[:j]])
        torch.testing.assert_close(answers[:, j], learner.read(memory, tokens[:, j : j + 1])[:, 0])


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6), (0, 0, 6)])
@pytest.mark.parametrize("kind", [Last, Mean])
def test_no_sequences_or_no_tokens(kind, shape):
    learner, tokens = kind(6, 4, torch.Generator()), torch.ones(shape)
    assert learner(tokens, WRITTEN[: shape[1]]).shape == shape
    assert learner.read(learner.remember(tokens), torch.ones(shape[0], 2, 6)).isfinite().all()


@pytest.mark.parametrize("kind", [Last, Mean])
def test_nothing_to_learn(kind):
    assert not kind(6, 4, torch.Generator()).state_dict()
