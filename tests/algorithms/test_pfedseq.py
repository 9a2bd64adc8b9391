"""pFedSeq by hand, and what must hold of its settings."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from by_hand import Federation, equal, make, played
from torch.nn.functional import softplus

from fedsim.algorithm import Cohort
from fedsim.algorithms.pfedseq import _half, _next_of_same
from fedsim.backend import LocalBackend
from fedsim.env import Ragged
from fedsim.plan import prepare
from fedsim.server import Server
from fedsim.simulation import resume, run


def test_round_one_is_fedavg_and_then_last_gives_each_client_its_own_residual_back():
    federation = Federation(make("pfedseq", learner="last"))
    federation.play()
    # As FedAvg: the average is (0.75, 4.5). The residuals are (3, 0) and (0, 6) less that.
    assert equal(federation.server["w"], [0.75, 4.5])
    assert equal(federation.rows["last"], [[2.25, -4.5], [-0.75, 1.5]])
    # w + residual, which is where each client's training ended.
    assert torch.allclose(federation.sent(), torch.tensor([[3.0, 0.0], [0.0, 6.0]]), atol=1e-5)


def test_round_two_averages_what_the_calibrated_clients_reach():
    federation = Federation(make("pfedseq", learner="last"))
    federation.play()
    federation.play()
    # Three quarters of the way from (3, 0) to (4, 0), and from (0, 6) to (0, 8): (3.75, 0) and (0, 7.5).
    assert torch.allclose(federation.server["w"], torch.tensor([0.9375, 5.625]), atol=1e-5)
    # Within a round by norm: client 1's residuals are the shorter ones, its weight in the average being the larger.
    assert federation.server["history"].clients().tolist() == [1, 0, 1, 0]
    assert federation.server["history"].rounds().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The mean of the tokens is (0.75, -1.5). At the clients' own lengths, part by part: (2.25, -4.5), (0.75, -1.5).
        ({}, [[3.0, 0.0], [1.5, 3.0]]),
        # Half of it, half their own last residuals (2.25, -4.5) and (-0.75, 1.5): client 1's cancel.
        ({"mix": 0.5}, [[3.0, 0.0], [0.75, 4.5]]),
        ({"gain": 2.0}, [[5.25, -4.5], [2.25, 1.5]]),
        ({"calibrated": ("adapter",)}, [[3.0, 4.5], [1.5, 4.5]]),
        # One part: the mean's direction (1, -2) / sqrt 5 at the lengths of the residuals, 2.25 and 0.75 sqrt 5.
        ({"parts": "row"}, [[3.0, 0.0], [1.5, 3.0]]),
    ],
)
def test_what_the_memory_says_at_the_clients_own_length(settings, expected):
    federation = Federation(make("pfedseq", learner="mean", **settings))
    federation.play()
    assert torch.allclose(federation.sent(), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # Updates were (3, 0) and (0, 6). Where the mean (1.5, 3) speaks, at the residuals' lengths.
        ("update", [[3.0, 9.0], [1.5, 6.0]]),
        # Side by side; the residuals' half answers.
        ("both", [[3.0, 0.0], [1.5, 3.0]]),
    ],
)
def test_tokens_may_be_updates(tokens, expected):
    federation = Federation(make("pfedseq", learner="mean", tokens=tokens))
    federation.play()
    assert equal(federation.rows["update"], [[3.0, 0.0], [0.0, 6.0]])
    assert torch.allclose(federation.sent(), torch.tensor(expected), atol=1e-5)


def test_a_memory_of_ones_own_knows_nothing_of_others():
    federation = Federation(make("pfedseq", learner="mean", order="per_client"))
    federation.play()
    # Each client's mean is its only token.
    assert torch.allclose(federation.sent(), torch.tensor([[3.0, 0.0], [0.0, 6.0]]), atol=1e-5)


def test_the_ssm_answers_from_the_tokens_of_all():
    federation = Federation(make("pfedseq", parts="row", train="none", state_size=2, half_life=1e6))
    federation.server["calibrator"].learners[0].W_up.data.zero_()
    federation.play()
    # Nothing fades, all deltas are equal, and the projection is orthogonal: y(q) ~ sum_j <e_j, e_q> x_j.
    assert torch.allclose(federation.sent(), torch.tensor([[3.0, 0.0], [0.0, 6.0]]), atol=1e-4)
    history = federation.server["history"]
    history.append(1, torch.tensor([0]), torch.tensor([[0.0, 8.0]]))
    server = {**federation.server, "memory": federation.server["calibrator"].remember(history.tokens())}
    sent = federation.algorithm.broadcast(server, torch.arange(2), federation.rows)["w"]
    # q = (2.25, -4.5), so e_q = (1, -2) / sqrt 5. Of the tokens (-0.75, 1.5), (2.25, -4.5) and (0, 8) the first is
    # turned round, the second taken, and <(0, 1), e_q> = -2 / sqrt 5 of the third: at q's length, 2.25 sqrt 5.
    answer = torch.tensor([3.0, -6 - 16 / 5**0.5])
    expected = torch.tensor([0.75, 4.5]) + answer / answer.norm() * 2.25 * 5**0.5
    assert torch.allclose(sent[0], expected, atol=1e-3)


def test_without_gain_it_is_fedavg_bit_for_bit():
    plain, calibrated = Federation(make("fedavg")), Federation(make("pfedseq", gain=0.0, finetune_epochs=0))
    for _ in range(3):
        plain.play()
        calibrated.play()
        assert torch.equal(plain.server["w"], calibrated.server["w"])
        assert torch.equal(plain.sent(), calibrated.sent())
        assert torch.equal(plain.personal(), calibrated.personal())


@pytest.mark.parametrize("learner", ["ssm", "ssd", "lstm", "gru", "mlp", "transformer", "last", "mean"])
def test_a_client_never_seen_is_sent_the_average_and_answered_after_one_update(learner):
    federation = Federation(make("pfedseq", learner=learner, state_size=4))
    for _ in range(3):
        federation.play()
    stranger = {"last": torch.tensor([[0.0, 0.0], [1.0, -2.0]])}
    payload = federation.algorithm.broadcast(federation.server, torch.tensor([0, 1]), stranger)
    assert torch.equal(payload["w"][0], federation.server["w"])
    calibration = payload["w"][1] - federation.server["w"]
    assert torch.allclose(calibration.abs(), torch.tensor([1.0, 2.0]), atol=1e-5)


@pytest.mark.parametrize("window", [1, 2])
def test_the_window_bounds_the_history(window):
    federation = Federation(make("pfedseq", window=window))
    for _ in range(3):
        federation.play()
    assert federation.server["history"].rounds().tolist() == [r for r in range(3 - window, 3) for _ in range(2)]
    federation = Federation(make("pfedseq", window=3, per_client=window))
    for _ in range(3):
        federation.play()
    assert len(federation.server["history"]) == 2 * window


def test_a_history_by_tokens_alone():
    federation = Federation(make("pfedseq", window=0, per_client=3, history_mib=1))
    for _ in range(5):
        federation.play()
    # Three rounds of both clients; a client that stays away would keep its own.
    assert federation.server["history"].rounds().tolist() == [2, 2, 3, 3, 4, 4]
    federation.server["history"].append(5, torch.tensor([1]), torch.zeros(1, 2))
    assert federation.server["history"].clients().bincount().tolist() == [3, 3]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"calibrated": ()}, "names no group"),
        ({"window": 0}, "one of them has to end the history"),
        ({"streaming": True, "learner": "lstm"}, "a learner of ssm, ssd"),
        ({"streaming": True, "order": "per_client"}, "order=interleaved"),
    ],
)
def test_settings_that_cannot_be(settings, told):
    with pytest.raises(ValueError, match=told):
        make("pfedseq", **settings)


@pytest.mark.parametrize("order", ["interleaved", "per_client"])
@pytest.mark.parametrize("learner", ["ssm", "lstm", "mean"])
def test_a_client_long_unseen_keeps_its_residual_as_its_query(order, learner):
    federation = Federation(make("pfedseq", learner=learner, order=order, window=1, train="none", state_size=2))
    federation.play()
    # Client 1 stays away, and its token leaves the window; client 0's new one is (2, 1).
    history, calibrator = federation.server["history"], federation.server["calibrator"]
    history.append(1, torch.tensor([0]), torch.tensor([[2.0, 1.0]]))
    assert history.clients().tolist() == [0]
    server = {**federation.server, "memory": calibrator.remember(history.tokens())}
    ids, rows = torch.tensor([1]), {"last": federation.rows["last"][1:]}
    sent = federation.algorithm.broadcast(server, ids, rows)["w"][0]
    assert torch.allclose((sent - server["w"]).abs(), torch.tensor([0.75, 1.5]), atol=1e-5)  # at its own length
    if order == "per_client" or learner == "lstm":  # nothing is left of it; and an untrained LSTM gives the query back
        assert torch.allclose(sent - server["w"], torch.tensor([-0.75, 1.5]), atol=1e-5)
    if (order, learner) == ("interleaved", "mean"):
        assert torch.allclose(sent - server["w"], torch.tensor([0.75, 1.5]), atol=1e-5)


@pytest.mark.parametrize("learner", ["ssm", "lstm", "transformer"])
@pytest.mark.parametrize("order", ["interleaved", "per_client"])
def test_what_a_client_is_sent_does_not_depend_on_who_is_in_its_block(tiny_config, learner, order):
    settings = (f"algorithm.learner={learner}", f"algorithm.order={order}", "algorithm.lr=0.03", "cohort=5")
    _, server = played(tiny_config("algorithm=pfedseq", *settings, "algorithm.state_size=4"), rounds=4)
    together = server.broadcast(4, tuple(range(8)))[0]["w"]
    alone = torch.cat([server.broadcast(4, (client,))[0]["w"] for client in range(8)])
    lengths = (together - server.state["w"]).norm(dim=1)
    assert lengths.max() > 1e-2
    assert ((together - alone).norm(dim=1) <= 1e-4 * lengths + 1e-6).all()


@pytest.mark.parametrize("learner", ["ssm", "ssd"])
def test_a_carried_memory_is_that_of_the_whole_history(learner):
    carried, whole = (
        Federation(make("pfedseq", learner=learner, train="none", streaming=streaming, window=4, state_size=2))
        for streaming in (True, False)
    )
    for _ in range(3):
        carried.play()
        whole.play()
    assert torch.allclose(carried.sent(), whole.sent(), atol=1e-5)


def test_the_learner_is_trained_as_it_is_told():
    def parameters(**settings):
        federation = Federation(make("pfedseq", parts="row", state_size=2, **settings))
        for _ in range(3):
            federation.play()
        metrics = federation.server["metrics"]
        return torch.cat([p.flatten() for p in federation.server["calibrator"].parameters()]).detach(), metrics

    start, untrained = parameters(train="none")
    assert "replay_loss" not in untrained and "vjp_loss" not in untrained
    for train, losses in (("replay", ["replay_loss"]), ("vjp", ["vjp_loss"]), ("both", ["replay_loss", "vjp_loss"])):
        trained, metrics = parameters(train=train)
        assert not torch.equal(start, trained)
        assert [name for name in metrics if name.endswith("_loss")] == losses
    assert torch.equal(start, parameters(train="replay", lr=0.0)[0])
    assert torch.equal(start, parameters(train="replay", gain=0.0)[0])
    assert torch.equal(start, parameters(train="replay", mix=0.0)[0])


def test_a_learner_that_may_yet_be_heard_is_trained():
    silent, learned = make("pfedseq", mix=0.0), make("pfedseq", mix=0.0, held_out=0.2)
    assert not silent._trains and learned._trains


def test_the_cost_by_hand():
    federation = Federation(make("pfedseq", learner="mlp", state_size=2, tokens="both"))
    federation.play()
    federation.play()
    metrics = federation.server["metrics"]
    # Two parts with a learner each: 2 x 2 and 2 x 2 weights, 2 biases. Adam keeps two numbers of each of them, and its
    # step of each tensor; the memory is a scale.
    assert metrics["learner_mib"] == 2 * 4 * (3 * (4 + 4 + 2) + 3 + 1) / 2**20
    assert metrics["history_mib"] == 4 * (4 * 4 + 16) / 2**20  # four tokens of four numbers, with client and round


@pytest.mark.parametrize("train", ["replay", "vjp"])
def test_residuals_are_of_what_the_clients_were_sent_not_of_what_the_learner_says_after_its_step(train):
    federation = Federation(make("pfedseq", parts="row", state_size=2, train=train, lr=0.1))
    for _ in range(4):
        sent = federation.sent()
        federation.play()
        # Three quarters of the way from there to (4, 0) and to (0, 8).
        trained = sent + 0.75 * (torch.tensor([[4.0, 0.0], [0.0, 8.0]]) - sent)
        assert torch.allclose(federation.server["w"] + federation.rows["last"], trained, atol=1e-5)


def test_every_vjp_step_aligns_the_calibrations_better_with_the_same_updates():
    # Parts of one number have no direction but their sign, so the row is one part.
    federation = Federation(make("pfedseq", train="vjp", parts="row", lr=0.01, learner="mlp", state_size=4))
    federation.play()
    delta, cohort = torch.tensor([[1.0, -1.0], [2.0, 0.5]]), Cohort(1, torch.arange(2), torch.ones(2))
    losses = [
        federation.algorithm._train(federation.server, cohort, delta, federation.rows)["vjp_loss"] for _ in range(20)
    ]
    assert all(after < before - 1e-3 for before, after in pairwise(losses))


def test_the_mix_steps_against_the_held_out_gradient():
    federation = Federation(make("pfedseq", learner="mean", held_out=0.2, mix_step=0.1, train="none"))
    server, rows = federation.server, {"last": torch.tensor([[2.25, -4.5], [-0.75, 1.5]])}
    server["memory"] = server["calibrator"].remember(rows["last"])
    cohort = Cohort(1, torch.arange(2), torch.ones(2))
    # The memory turns client 1 round, by (1.5, -3), and leaves client 0 where it is. Along client 1's held-out gradient
    # the slope of the adapter's bank is 1.5, of two clients 0.75 +- 0.53: a whole step. The head's is 0.
    gradient = torch.tensor([[3.0, 4.0], [5.0, 0.0]])
    mix = federation.algorithm._taught_mix(server, cohort, gradient, rows)
    torch.testing.assert_close(mix, torch.tensor([0.9, 1.0]))
    # Where they disagree it is smaller: slopes 0, 1.5 and -1.2 of equal clients are 0.1 +- 1.1 / sqrt 3.
    rows = {"last": torch.tensor([[2.25, -4.5], [-0.75, 1.5], [-0.6, 1.5]])}
    gradient = torch.tensor([[3.0, 4.0], [5.0, 0.0], [-5.0, 0.0]])
    cohort = Cohort(1, torch.arange(3), torch.ones(3))
    mix = federation.algorithm._taught_mix(server, cohort, gradient, rows)
    slopes = torch.tensor([0.0, 1.5, -1.2])
    step = 0.1 * slopes.mean() / (slopes.std(correction=0) / 3**0.5)
    torch.testing.assert_close(mix, torch.stack([1 - step, torch.tensor(1.0)]))


def test_held_out_samples_are_not_trained_on_and_cost_one_more_upload(tiny_config, tmp_path):
    bytes_up, losses = [], []
    for share in (0.0, 0.3):
        settings = ["algorithm=pfedseq", f"algorithm.held_out={share}", "algorithm.mix=0.5", "rounds=3", "cohort=8"]
        folder = run(tiny_config(*settings, f"output={tmp_path / str(share)}")).folder
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        bytes_up.append(records[0]["bytes"]["up"])
        losses.append(records[0]["loss"])
        assert records[0]["algorithm"]["mix_0"] == 0.5  # nobody had a residual
        moved = abs(records[2]["algorithm"]["mix_0"] - 0.5)
        assert 0 < moved <= 0.2 if share else moved == 0
    assert bytes_up[1] == 2 * bytes_up[0]
    assert losses[0] != losses[1]


def held_out(tiny_config, sizes, block):
    """What a block sends of held-out samples, and its contexts' gradient of all of them at once."""
    plan = prepare(tiny_config("algorithm=pfedseq", "algorithm.held_out=0.5"))
    data = plan.workload.data
    train = Ragged.of([data.train[client][: sizes[client]] for client in range(data.num_clients)])
    backend = LocalBackend(replace(plan.workload, data=replace(data, train=train)), plan.params)
    w = plan.params.expand(len(block), -1)
    rows = {"last": torch.zeros_like(w)}
    context = partial(backend.simulator._context, 0, block, "train")
    update, _ = backend.simulator.algorithm.local_update({"w": w}, rows, context())
    _, held = context().split(0.5)
    batches = list(held.batches(1, batch_size=100))
    return update["gradient"], held.grad(w, batches[0]) if batches else None


def test_the_held_out_gradient_is_that_of_the_mean_loss(tiny_config):
    # Five and four samples held out, in batches of four: the fifth's batch is no equal of the first.
    gradient, expected = held_out(tiny_config, [10, 8, 1] + [8] * 5, (0, 1))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.any(1).all()


@pytest.mark.parametrize("block", [(2,), (2, 0), (2, 3)])
def test_a_client_with_nothing_to_hold_out_teaches_nothing(tiny_config, block):
    gradient, _ = held_out(tiny_config, [10, 8, 1, 1] + [8] * 4, block)
    assert gradient.any(1).tolist() == [client == 0 for client in block]


@pytest.mark.parametrize(("order", "tokens"), [("interleaved", 20.0), ("per_client", 2.5)])
def test_the_half_life_is_in_rounds_of_the_sequence(tiny_config, order, tokens):
    # 4 of 16 clients a round: a client's own tokens come every fourth.
    settings = ["algorithm=pfedseq", f"algorithm.order={order}", "algorithm.half_life=5"]
    plan = prepare(tiny_config(*settings, "env.num_clients=32", "cohort=4" if order == "interleaved" else "cohort=16"))
    server = Server(plan.workload, plan.params).state
    for learner in server["calibrator"].learners:
        torch.testing.assert_close(softplus(learner.b), torch.full_like(learner.b, math.log(2) / tokens))


def test_a_learner_that_gives_its_query_back_has_no_lesson_in_rebuilding_it():
    for learner, lesson in (("mlp", False), ("lstm", False), ("transformer", False), ("ssm", True), ("ssd", True)):
        federation = Federation(make("pfedseq", parts="row", learner=learner, state_size=2))
        federation.play()
        server = federation.server
        assert bool(federation.algorithm._replay_loss(server, 1) > 0) is lesson  # nobody has a next token yet
        server["history"].append(1, torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        assert federation.algorithm._replay_loss(server, 1) > 0


def test_what_is_replayed_of_sequences_of_their_own_is_bounded_too(monkeypatch):
    federation = Federation(make("pfedseq", order="per_client", window=4, replay_tokens=4, state_size=2))
    for _ in range(4):
        federation.play()
    asked = []
    sequences = federation.server["history"].sequences

    def counted(ids, longest):
        asked.append(ids.tolist())
        return sequences(ids, longest)

    monkeypatch.setattr(federation.server["history"], "sequences", counted)
    federation.algorithm._replay_loss(federation.server, 4)
    assert asked == [[0]]  # the newest client's, four tokens of one; client 0 is last by norm


def test_memory_by_hand():
    d, mib = 2, 2**20
    fixed = 4 * d * 10 * 64 + 4 * 64 * mib  # ten arrays of a state, four of a scan's budget
    token = 64 + 32  # a row begins at a multiple of 64 bytes, and there is half as much room again
    plain = 20 * token
    assert make("pfedseq").memory_bytes() == plain + fixed  # window 10, two clients a round; read as it lies
    assert make("pfedseq", learner="lstm").memory_bytes() == plain + fixed + 4 * d * 20
    assert make("pfedseq", train="vjp").memory_bytes() == plain + fixed + 4 * 4 * d * 20
    by_client = 4 * d * 64 * 2  # a state of each of two clients
    assert make("pfedseq", order="per_client").memory_bytes() == plain + fixed + by_client
    assert make("pfedseq", order="per_client", train="both").memory_bytes() == (
        plain + fixed + 3 * by_client + 4 * 4 * d * 20
    )


def test_half_of_the_clients_ask_whatever_their_names_are():
    clients = [7, 3, 7, 9, 1, 3]
    first, second, third = (_half(clients, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == second and len(first) == len(third) == 2 and first < set(clients)
    renamed = {7: 0, 3: 1, 9: 2, 1: 3}
    again = _half([renamed[client] for client in clients], torch.Generator().manual_seed(0))
    assert again == {renamed[client] for client in first}


def test_the_target_is_the_clients_next_token():
    assert _next_of_same([7, 3, 7, 9, 7, 3]).tolist() == [2, 5, 4, 3, 4, 5]


def test_attention_by_hand():
    federation = Federation(make("pfedseq", parts="row", train="none", state_size=2, half_life=1e6))
    federation.play()
    metrics = federation.server["metrics"]
    # Two tokens, the same but for their sign and length; both clients asked, so each has one of its own.
    assert metrics["attention_own_0"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["attention_others_0"] == pytest.approx(0.5, abs=1e-3)
    federation.play()
    metrics = federation.server["metrics"]
    for whose in ("own_0", "own_1_3", "others_0", "others_1_3"):
        assert metrics[f"attention_{whose}"] == pytest.approx(0.25, abs=1e-3)
    assert sum(value for name, value in metrics.items() if name.startswith("attention")) == pytest.approx(1)


@pytest.mark.parametrize("learner", ["ssm", "ssd", "transformer"])
def test_a_restored_server_answers_bit_for_bit(tiny_config, tmp_path, learner):
    """Rows of odd length: where a number lies in memory shows in the last bits of products of matrices."""
    settings = ["algorithm=pfedseq", f"algorithm.learner={learner}", "algorithm.window=2", "adapter.width=3"]
    plan, server = played(tiny_config(*settings, "cohort=5", "algorithm.state_size=16"), rounds=4)
    server.save(tmp_path / "round-00004", {})
    restored = Server(plan.workload, plan.params)
    restored.load(tmp_path / "round-00004")
    for round in (4, 5, 6):
        ids = tuple(plan.sample_cohort(round).tolist())
        for client in ids:
            sent, again = (each.broadcast(round, (client,))[0]["w"] for each in (server, restored))
            assert torch.equal(sent, again)
        update = {"delta": torch.randn(5, len(plan.params), generator=torch.Generator().manual_seed(round))}
        for each in (server, restored):
            each.aggregate(round, [ids], [(update, each.broadcast(round, ids)[1])])
    assert server.state["metrics"] == restored.state["metrics"]


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm.learner=ssd", "algorithm.streaming=true", "algorithm.dtype=bf16"),
        ("algorithm.learner=lstm", "algorithm.order=per_client", "algorithm.per_client=2"),
        ("algorithm.learner=transformer", "algorithm.tokens=both", "algorithm.train=both"),
    ],
)
def test_every_kind_of_memory_is_in_the_checkpoint(tiny_config, tmp_path, stopped_after, settings):
    settings = ["algorithm=pfedseq", *settings, "rounds=4", "eval.every=2", "algorithm.state_size=4"]
    summaries = [run(tiny_config(*settings, f"output={tmp_path / 'undisturbed'}")).summary]
    with stopped_after(2):
        run(tiny_config(*settings, f"output={tmp_path / 'stopped'}"))
    summaries.append(resume(tmp_path / "stopped").summary)
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    records = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in
               ("undisturbed", "stopped")]  # fmt: skip
    assert records[0]["algorithm"] == records[1]["algorithm"]
    assert records[0]["seconds"]["learner"] > 0
