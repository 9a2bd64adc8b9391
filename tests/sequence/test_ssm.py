"""S6 and its dual as memories: two tokens by hand, their laws."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from fedsim.sequence import make_learner, ssm
from fedsim.sequence.dual import dual_sequential
from fedsim.sequence.learner import Learner
from fedsim.sequence.scan import selective_scan_sequential
from fedsim.sequence.ssd import StateSpaceDual
from fedsim.sequence.ssm import SelectiveSSM, orthonormal

BOTH = pytest.mark.parametrize("kind", ["ssm", "ssd"])
WRITTEN = torch.arange(20) % 3 != 1


def _learner(kind: str = "ssm", width: int = 12, state_size: int = 4, seed: int = 0, half_life: float = 8.0) -> Learner:
    return make_learner(kind, width, state_size, torch.Generator().manual_seed(seed), half_life, None)


def _tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_two_tokens_by_hand(kind):
    learner = _learner(kind, 1, 1)
    with torch.no_grad():
        (learner.W_up if kind == "ssm" else learner.w_delta).zero_()  # then delta = softplus(b) whatever the token
        learner.b.fill_(math.log(math.expm1(math.log(2))))
        learner.W_B.fill_(3.0)
        learner.W_C.fill_(5.0)
    # A = -1, so a token halves the past; directions are 1 and -1: h_1 = ln2 3 2, h_2 = h_1 / 2 + ln2 (-3) (-4) = 15 ln2
    tokens, ln2 = torch.tensor([[[2.0], [-4.0]]]), math.log(2)
    memory = learner.remember(tokens)
    torch.testing.assert_close(memory["h"].item(), 15 * ln2, atol=0, rtol=1e-6)
    # A query of any length asks with its direction.
    answers = learner.read(memory, torch.tensor([[[7.0], [-0.1]]]))
    torch.testing.assert_close(answers.flatten(), torch.tensor([75 * ln2, -75 * ln2]), atol=0, rtol=1e-6)
    # The second token asks before it is written: what the first one left, undecayed.
    answers = learner(tokens, torch.tensor([True, True]))
    torch.testing.assert_close(answers.flatten(), torch.tensor([0, -30 * ln2]), atol=0, rtol=1e-6)


def test_all_positions_of_the_ssm_are_the_equations():
    learner, x = _learner(), _tokens(2, 20, 12)
    assert isinstance(learner, SelectiveSSM)
    e, A = normalize(x, dim=-1), -torch.ones(12, 4)
    y, h = selective_scan_sequential(x, learner.delta(e), A, e @ learner.W_B, (e @ learner.W_C).roll(-1, 1))
    answers = learner(x, torch.ones(20, dtype=torch.bool))
    torch.testing.assert_close(answers[:, 1:], y[:, :-1])
    torch.testing.assert_close(learner.remember(x)["h"], h)


def test_all_positions_of_the_dual_are_the_equations():
    learner, x = _learner("ssd"), _tokens(2, 20, 12)
    assert isinstance(learner, StateSpaceDual)
    e = normalize(x, dim=-1)
    B, C = (e @ learner.W_B)[:, :, None], (e @ learner.W_C).roll(-1, 1)[:, :, None]
    y, h = dual_sequential(x, learner.delta(e), -torch.ones(1), B, C)
    answers = learner(x, torch.ones(20, dtype=torch.bool))
    torch.testing.assert_close(answers[:, 1:], y[:, :-1])
    torch.testing.assert_close(learner.remember(x)["h"], h)


@pytest.mark.parametrize("half_life", [8.0, 1e-2])
def test_the_last_state_is_the_same_with_gradients_and_without_and_whatever_there_is_room_for(half_life):
    tokens, found = _tokens(3, 20, 12), []
    for budget in (None, 1e-6):
        learner = _learner(half_life=half_life)
        learner.budget_mib = budget
        with torch.no_grad():
            without = learner.remember(tokens)["h"]
        h = learner.remember(tokens)["h"]
        torch.testing.assert_close(h, without, rtol=1e-5, atol=1e-6)
        h.square().sum().backward()
        found.append([h.detach(), *(p.grad for p in learner.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 6  # W_C alone has no part in it
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_half_life_of_no_time_at_all():
    assert ssm.softplus_inverse(math.log(2)) == pytest.approx(0, abs=1e-15)  # log(2 - 1)
    assert ssm.softplus_inverse(7e3) == 7e3


@pytest.mark.parametrize("half_life", [8.0, 1e-2])
def test_the_scan_and_the_product_of_all_tokens_are_the_same(monkeypatch, half_life):
    """Without room for the product, or where a token fades at once, it is the scan."""
    tokens, found = _tokens(3, 20, 12), []
    for most, budget in ((ssm.MOST_FADING, None), (-1.0, None), (ssm.MOST_FADING, 1e-6)):
        monkeypatch.setattr(ssm, "MOST_FADING", most)
        learner = _learner(half_life=half_life)
        learner.budget_mib = budget
        answers = learner(tokens, WRITTEN)
        answers.square().sum().backward()
        found.append([answers.detach(), *(p.grad for p in learner.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    called = []
    monkeypatch.setattr(ssm, "MOST_FADING", 40.0)
    monkeypatch.setattr(ssm, "selective_scan", lambda *args, **more: (called.append(1), args[0])[1])
    _learner(half_life=half_life)(tokens, WRITTEN)
    assert len(called) == (half_life < 1)  # which scans: 20 half-lives of 0.01 are too many to divide by


@BOTH
def test_a_token_asks_what_was_written_before_it(kind):
    learner, tokens = _learner(kind), _tokens(3, 20, 12)
    answers = learner(tokens, WRITTEN)
    for j in range(20):
        memory = learner.remember(tokens[:, :j][:, WRITTEN[:j]])
        torch.testing.assert_close(answers[:, j], learner.read(memory, tokens[:, j : j + 1])[:, 0])


@BOTH
def test_a_token_that_is_not_written_leaves_no_trace(kind):
    learner, tokens = _learner(kind), _tokens(3, 20, 12)
    changed = torch.where(WRITTEN[:, None], tokens, 100 * tokens + 1)
    assert torch.equal(learner(tokens, WRITTEN)[:, WRITTEN], learner(changed, WRITTEN)[:, WRITTEN])


@BOTH
@pytest.mark.parametrize("cut", [0, 1, 13, 20])
def test_a_carried_memory_needs_only_the_new_tokens(kind, cut):
    learner, tokens = _learner(kind), _tokens(2, 20, 12)
    carried = learner.remember(tokens[:, cut:], learner.remember(tokens[:, :cut]))
    torch.testing.assert_close(carried["h"], learner.remember(tokens)["h"])


@BOTH
def test_an_empty_memory_says_nothing(kind):
    learner, query = _learner(kind), _tokens(2, 3, 12)
    assert torch.equal(learner.read(learner.remember(query[:, :0]), query), torch.zeros(2, 3, 12))


@BOTH
def test_an_untrained_memory_is_addressed_by_content(kind):
    learner = _learner(kind, width=2000, state_size=64, half_life=50)
    kinds = _tokens(2, 2000)
    tokens = kinds.repeat(20, 1) + 0.3 * _tokens(40, 2000, seed=3)
    answers = learner.read(learner.remember(tokens[None]), kinds[None])[0]
    same, other = cosine_similarity(answers, kinds), cosine_similarity(answers, kinds.flip(0))
    assert (same > 0.9).all() and (other.abs() < 0.3).all()


@BOTH
def test_half_of_a_token_is_left_after_the_half_life(kind):
    learner, tokens = _learner(kind, half_life=5), _tokens(1, 6, 12)
    with torch.no_grad():
        (learner.W_up if kind == "ssm" else learner.w_delta).zero_()
    one = learner.remember(tokens[:, :1])["h"]
    later = torch.cat([tokens[:, :1], torch.zeros(1, 5, 12)], 1)
    torch.testing.assert_close(learner.remember(later)["h"], one / 2)


@BOTH
def test_every_parameter_is_reached_by_the_gradient(kind):
    for answer in (lambda m, x: m(x, WRITTEN)[:, ~WRITTEN], lambda m, x: m.read(m.remember(x), x[:, -2:])):
        learner, tokens = _learner(kind), _tokens(2, 20, 12)
        answer(learner, tokens).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learner.parameters())


@BOTH
def test_the_generator_decides_the_start(kind):
    first, same, other = _learner(kind), _learner(kind), _learner(kind, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.W_B, other.W_B)


def test_no_parameter_is_k_by_k():
    learner = _learner(width=1000, state_size=4)
    assert sum(p.numel() for p in learner.parameters()) == 1000 * (2 * 4 + 2 * 4 + 1) + 1


@pytest.mark.parametrize(("width", "state_size"), [(9, 4), (4, 9), (5, 5)])
def test_projections_are_orthonormal_up_to_their_length(width, state_size):
    W = orthonormal(width, state_size, torch.Generator().manual_seed(0))
    assert W.shape == (width, state_size)
    gram = W.t() @ W if width >= state_size else W @ W.t()
    torch.testing.assert_close(gram, torch.eye(min(width, state_size)) * max(1, width / state_size))


@pytest.mark.parametrize("elements", [1, 30, 60, 10**6])
@pytest.mark.parametrize("carried", [False, True])
def test_a_memory_does_not_depend_on_how_it_is_cut_to_fit_a_cache(monkeypatch, elements, carried):
    learner, tokens = _learner(), _tokens(5, 6, 12)
    before = learner.remember(_tokens(5, 3, 12, seed=2)) if carried else None
    whole = learner.remember(tokens, before)["h"]
    monkeypatch.setattr(ssm, "CACHED_ELEMENTS", elements)
    torch.testing.assert_close(learner.remember(tokens, before)["h"], whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 3e-10)])
def test_softplus_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.cat([torch.linspace(-80, 100, 20_001), torch.tensor([0.0, 20.0, 1e4])]).to(dtype).requires_grad_()
    expected = torch.nn.functional.softplus(x.detach().double()).to(dtype)
    torch.testing.assert_close(ssm.softplus(x).detach(), expected, rtol=tolerance, atol=0)
    assert ssm.softplus(torch.tensor(-1000.0)) == 0
    ours, torchs = (torch.autograd.grad(of(x).sum(), x)[0] for of in (ssm.softplus, torch.nn.functional.softplus))
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(ssm.softplus, torch.linspace(-5, 5, 9, dtype=torch.float64).requires_grad_())
