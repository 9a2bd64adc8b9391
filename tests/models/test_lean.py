"""What a simulator holds for itself is kept small: in a process of its own, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fedsim.config import ModelConfig
from fedsim.models.vit import create_backbone

CODE = """
import sys
import torch
import fedsim.actors
from fedsim.config import AdapterConfig, ModelConfig
from fedsim.models.vit import VitModel

model = ModelConfig(name="test_vit", weights="random", img_size=16, options={"patch_size": 8})
frozen = dict(torch.load(sys.argv[1], weights_only=True))
made = VitModel(model, AdapterConfig(blocks="last:1", width=2), 3, {k: v.numpy() for k, v in frozen.items()})
w = made.initial(torch.Generator())[None].requires_grad_()
made.logits(w, torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)).sum().backward()
unwanted = {"torch._dynamo", "sympy", "matplotlib", "pandas", "tensorboard"} & sys.modules.keys()
assert not unwanted, unwanted

from torchvision.ops import roi_align  # what was put off works when it is called
boxes = [torch.tensor([[0.0, 0.0, 2.0, 2.0]])]
assert roi_align(torch.ones(1, 1, 4, 4), boxes, 1).tolist() == [[[[1.0]]]]
assert torch.compiler.disable(lambda x: x + 1)(1) == 2
"""


def test_a_simulator_takes_no_compiler_and_who_asks_for_one_gets_it(tmp_path: Path) -> None:
    model = ModelConfig(name="test_vit", weights="random", img_size=16, options={"patch_size": 8})
    torch.save(create_backbone(model).state_dict(), tmp_path / "frozen.pt")
    command = [sys.executable, "-c", CODE, str(tmp_path / "frozen.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
