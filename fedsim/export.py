"""What a run trained, for use outside of fedsim: one client's adapters and head as a state dict with timm's names.

    head.weight [classes, k], head.bias [classes]
    blocks.I.mlp.adapter.{down,up}.{weight,bias}        bottlenecks: as those of nn.Linear
    blocks.I.{attn.qkv,mlp.fc1,mlp.fc2}.lora_{A,B}.weight [r, in], [out, r]

``adapter.scale`` is already in the tensors that an adapter ends with. A second adapter that an algorithm has beside the
first is the same as one of twice the width, and two heads are their sum: there is one of each here. docs/export.md has
a loader that needs timm alone. LoRA is written in peft's layout, too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedsim import __version__
from fedsim.backend import LocalBackend
from fedsim.errors import ConfigError, OutputError
from fedsim.files import replacing, write_atomically
from fedsim.layout import Layout
from fedsim.local import LocalContext
from fedsim.plan import Plan
from fedsim.simulation import restored
from fedsim.simulator import guarded

_NAMES = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias",
          "A": "lora_A.weight", "B": "lora_B.weight"}  # fmt: skip
_WIDTH = {"down": 1, "down_bias": 0, "up": 0, "A": 1, "B": 0}  # the axis along which two make one of twice the width
_SCALED = ("up", "up_bias", "B")


@dataclass(frozen=True)
class PersonalModel:
    """What one client ends up with.

    Attributes:
        tensors: its adapters and head, float32, by name.
        backbone: the frozen tensors under them, by timm's names.
        about: what it is, each value a text; those that are no plain text are JSON.
    """

    tensors: dict[str, Tensor]
    backbone: dict[str, Tensor]
    about: dict[str, str]


def export(folder: Path, client: int, out: Path | None, backbone: bool, console: Console) -> list[Path]:
    """Writes a client's model as safetensors; LoRA beside it in a folder that peft loads.

    Args:
        folder: the run's.
        client: whose.
        out: the file; default: ``export/client-ID.safetensors`` in the run's folder. An older one is replaced.
        backbone: put the frozen tensors into the file, too.
        console: for a person.

    Returns:
        The file, and the folder for peft if there is one.

    Raises:
        OutputError: the file cannot be written; and as ``personal_model``.
    """
    out = out or folder / "export" / f"client-{client}.safetensors"
    if os.path.isdir(out):  # pathlib's raises where a name is too long
        raise OutputError(f"--out: {out} is a folder; name a file")
    model = personal_model(folder, client, console)
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _save({**(model.backbone if backbone else {}), **model.tensors}, model.about, out)
        if model.about["adapter"] == "lora":
            written.append(out.with_name(f"{out.stem}-peft"))
            _save_for_peft(model, written[-1])
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--out: {out} cannot be written ({error})") from None
    return written


def personal_model(folder: Path, client: int, console: Console | None = None) -> PersonalModel:
    """What ``personalise`` gives for a client at the run's newest checkpoint: the model that is evaluated there.

    Raises:
        OutputError: it is no run folder, or the algorithm predicts with more than adapters and a head.
        ConfigError: there is no such client.
        CheckpointError: no checkpoint can be read, or the data or the backbone are not those of the run.
    """
    with restored(folder, console or Console(quiet=True)) as (plan, backend, rounds):
        last = plan.workload.data.num_clients - 1
        if not 0 <= client <= last:
            raise ConfigError([f"--client: {client}, but the run has clients 0 to {last}"])
        row, scale = _row(plan, backend, client, rounds), plan.workload.config.adapter.scale
        tensors = state_dict(plan.workload.task.layout, row, scale)
        frozen = {name: torch.from_numpy(value.copy()) for name, value in plan.workload.frozen.items()}
        return PersonalModel(tensors, frozen, _about(plan, backend, client, rounds))


def _row(plan: Plan, backend: LocalBackend, client: int, rounds: int) -> Tensor:
    """The row ``[d]`` of this client alone, as ``Simulator.evaluate`` gets it."""
    config, simulator, ids, round = plan.workload.config, backend.simulator, (client,), rounds - 1
    payload, rows = (
        {name: value.to(simulator.model.device, copy=True) for name, value in state.items()}
        for state in backend.server.broadcast(round, ids)
    )
    local = config.local.in_round(round, config.rounds)
    context = LocalContext(simulator.model, simulator.samples, ids, local, config.seed, round, "personalise")
    found = guarded("personalise", round, ids, lambda: simulator.algorithm.personalise(payload, rows, context))
    if not isinstance(found, Tensor):
        told = f"{config.algorithm.name} predicts with more than adapters and a head, which is all that can be exported"
        raise OutputError(f"algorithm: {told}")
    return found[0].detach().cpu()


def state_dict(layout: Layout, row: Tensor, scale: float) -> dict[str, Tensor]:
    """A client's row ``[d]`` as named tensors, weights ``[out, in]`` as torch has them; ``scale``: of the adapters."""
    found: dict[str, list[Tensor]] = {}
    for name, value in layout.views(row[None]).items():
        found.setdefault(name.removeprefix("backbone.").replace(".personal.", "."), []).append(value[0])
    return dict(_tensor(name, twins, scale) for name, twins in found.items())


def _tensor(name: str, twins: list[Tensor], scale: float) -> tuple[str, Tensor]:
    """A tensor, joined with the one beside it if there are two, under its new name."""
    module, _, own = name.rpartition(".")
    value = torch.cat(twins, _WIDTH[own]) if own in _WIDTH else torch.stack(twins).sum(0)
    value = value * scale if own in _SCALED else value
    return f"{module}.{_NAMES.get(own, own)}", (value.t() if value.ndim == 2 else value).contiguous()


def _about(plan: Plan, backend: LocalBackend, client: int, rounds: int) -> dict[str, str]:
    config, data, pixels = plan.workload.config, plan.workload.data, backend.simulator.model.pixels
    made = {"model_name": config.model.name, "img_size": config.model.img_size, "num_classes": len(data.classes)}
    own = config.model.weights in ("pretrained", "public", "random")
    return {
        "format": "pt",
        "what": f"adapters and head of client {client} after round {rounds}: {config.algorithm.name} on "
        f"{config.env.name}, made by fedsim {__version__}",
        "client": str(client),
        "round": str(rounds),
        "seed": str(config.seed),
        "model": json.dumps({**made, **config.model.options}),  # the arguments of timm.create_model
        "weights": config.model.weights if own else Path(config.model.weights).name,
        "backbone_sha256": plan.about["backbone"]["sha256"],
        "mean": json.dumps([round(value, 6) for value in pixels.mean.flatten().tolist()]),
        "std": json.dumps([round(value, 6) for value in pixels.std.flatten().tolist()]),
        "classes": json.dumps(data.classes),
        "adapter": config.adapter.kind,
    }


def _save(tensors: dict[str, Tensor], about: dict[str, str], path: Path) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, about)


def _save_for_peft(model: PersonalModel, folder: Path) -> None:
    """What ``PeftModel.from_pretrained(timm_model, folder)`` reads."""
    targets = [name.removesuffix(".lora_A.weight") for name in model.tensors if name.endswith(".lora_A.weight")]
    rank = len(model.tensors[f"{targets[0]}.lora_A.weight"])
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha / r is 1: the scale is in B
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": targets,
        "modules_to_save": ["head"],
    }
    folder.mkdir(exist_ok=True)
    _save({f"base_model.model.{name}": value for name, value in model.tensors.items()}, {"format": "pt"},
          folder / "adapter_model.safetensors")  # fmt: skip
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
