"""One round of FFA-LoRA by hand: a row is one element of A and one of B. A stays; B goes 3/4 of the way to 0 and 8."""

import pytest
import torch
from by_hand import Federation, equal

from fedsim.__main__ import main
from fedsim.algorithm import Task
from fedsim.backend import LocalBackend
from fedsim.config import algorithm_class
from fedsim.errors import ConfigError
from fedsim.layout import Layout
from fedsim.plan import prepare

LAYOUT = Layout.of([("x.A", (1,), "adapter.A"), ("x.B", (1,), "adapter.B")])


def make(name):
    found = algorithm_class(name)
    return found(found.Config(), Task(LAYOUT, 2, 2, 2, 0.5, 1, 2))


def test_only_b_is_trained_averaged_and_sent():
    federation = Federation(make("ffa_lora"))
    federation.play()
    assert equal(federation.server["w"], [0.0, 4.5])  # FedAvg would have moved A to 0.75
    assert equal(federation.personal(), [[0.0, 4.5], [0.0, 4.5]])
    assert federation.payload()["w"].tolist() == [[4.5]]
    assert torch.equal(federation.algorithm.average(federation.server), federation.server["w"])


def test_in_a_run_a_stays_what_it_was_and_all_else_is_trained(tiny_config):
    plan = prepare(tiny_config("algorithm=ffa_lora", "adapter=lora"))
    backend = LocalBackend(plan.workload, plan.params)
    backend.train(0, plan.blocks(plan.sample_cohort(0)))
    facts = backend.aggregate(0)
    w, frozen = backend.server.average(), plan.workload.task.layout.mask("adapter.A")
    backend.close()
    assert torch.equal(w[frozen], plan.params[frozen]) and frozen.any()
    assert (w != plan.params)[~frozen].float().mean() > 0.9
    assert facts["bytes_up"] == 4 * 4 * int((~frozen).sum())  # four clients


@pytest.mark.parametrize("name", ["ffa_lora", "fedsa_lora"])
def test_without_lora_it_is_refused_in_one_line(tiny_config, name, capsys, tmp_path):
    told = f"algorithm: {name} needs 'adapter.A', which adapter=sequential has not; set adapter=lora"
    with pytest.raises(ConfigError) as caught:
        prepare(tiny_config(f"algorithm={name}"))
    assert caught.value.mistakes == [told]
    from conftest import TINY

    assert main(["run", *TINY, f"algorithm={name}", f"output={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"fedsim: {told}"]
