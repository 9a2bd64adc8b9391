"""What a simulator holds for itself is kept small: in a process of its own, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import torch
import fedsim.actors
from fedsim.backend import LocalBackend
from fedsim.config import load
from fedsim.plan import prepare
from conftest import TINY

plan = prepare(load(None, list(TINY)))
backend = LocalBackend(plan.workload, plan.params)
backend.train(0, plan.blocks(plan.sample_cohort(0)))
backend.evaluate(0, plan.evaluation_blocks())
assert not {"torch._dynamo", "sympy", "matplotlib", "pandas", "tensorboard"} & sys.modules.keys(), sys.modules.keys()

from torchvision.ops import roi_align  # what was put off works when it is called
boxes = [torch.tensor([[0.0, 0.0, 2.0, 2.0]])]
assert roi_align(torch.ones(1, 1, 4, 4), boxes, 1).tolist() == [[[[1.0]]]]
assert torch.compiler.disable(lambda x: x + 1)(1) == 2
"""


def test_a_simulator_takes_no_compiler_and_who_asks_for_one_gets_it() -> None:
    tests = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tests, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
