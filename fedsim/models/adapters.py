"""Adapters and the head, with a leading client axis.

Each module declares its parameters for one client; in a forward pass they are replaced by ``[C, *shape]`` views of the
clients' rows, and the batch holds ``C x b`` samples, those of client 0 first. Only these few products have a client
axis; the frozen backbone sees one batch.

- bottleneck, sequential: ``h + up(gelu(down(h)))`` on the output h of the MLP. Houlsby et al., "Parameter-Efficient
  Transfer Learning for NLP", ICML 2019; after the MLP alone, as in Pfeiffer et al., EACL 2021.
- bottleneck, parallel: ``MLP(x) + scale * up(gelu(down(x)))``. He et al., "Towards a Unified View of
  Parameter-Efficient Transfer Learning", ICLR 2022 (AdaptFormer's form, with GELU).
- LoRA: ``W x + scale * x A B`` on qkv and the two linears of the MLP. Hu et al., "LoRA", ICLR 2022; ``scale`` is
  their alpha / r.

Where an algorithm declares them, adapters or the head have a second one beside them (``personal``), of the same form,
whose output is added. An adapter's output, like a head's, is linear in its last matrix (``OUTPUTS``), so that an
algorithm mixes the two by scaling these elements of the row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS = ("up", "up_bias", "B", "weight", "bias")
"""Names of the tensors that an adapter's or a head's output is linear in."""


def clientwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [C * b, ..., i]`` times ``weight [C, i, o]`` plus ``bias [C, o]``, each client with its own."""
    rows = x.reshape(weight.shape[0], -1, x.shape[-1])
    if torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[-1])


def trainable(*shape: int) -> nn.Parameter:
    """A parameter of one client; its value comes from the row."""
    return nn.Parameter(torch.zeros(shape))


def uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    """Uniform in ``±bound``; ``bound = sqrt(3 / fan_in)`` keeps the variance of what passes."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class ClientModule(nn.Module):
    """What each client has its own values of.

    Attributes:
        group: its group in the layout.
        personal: the second one of its form, if there is one.
    """

    group: str
    personal: ClientModule | None

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group, self.personal = group, None

    def init_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial values by name; what is not named starts at zero."""
        raise NotImplementedError


class Bottleneck(ClientModule):
    """Down to ``width``, GELU, up again; the up projection starts at zero."""

    def __init__(self, dim: int, width: int, scale: float, group: str = "adapter") -> None:
        super().__init__(group)
        self.scale = scale
        self.down, self.down_bias = trainable(dim, width), trainable(width)
        self.up, self.up_bias = trainable(width, dim), trainable(dim)

    def init_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"down": uniform(self.down.shape, math.sqrt(3 / self.down.shape[0]), generator)}

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale * clientwise(F.gelu(clientwise(x, self.down, self.down_bias)), self.up, self.up_bias)
        return out if self.personal is None else out + self.personal(x)


class SequentialMlp(nn.Module):
    """A block's MLP followed by a bottleneck with a skip connection."""

    def __init__(self, mlp: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.mlp(x))

    def adapted(self, x: Tensor, h: Tensor) -> Tensor:
        """What comes out, from what goes in and what the frozen MLP makes of it."""
        return h + self.adapter(h)


class ParallelMlp(SequentialMlp):
    """A block's MLP with a bottleneck beside it."""

    def adapted(self, x: Tensor, h: Tensor) -> Tensor:
        return h + self.adapter(x)


class LowRank(ClientModule):
    """A low-rank linear map; B starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, group: str = "adapter") -> None:
        super().__init__(group)
        self.scale = scale
        self.A, self.B = trainable(linear.in_features, rank), trainable(rank, linear.out_features)

    def init_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"A": uniform(self.A.shape, math.sqrt(3 / self.A.shape[0]), generator)}

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * clientwise(clientwise(x, self.A), self.B)


class LoraLinear(LowRank):
    """A frozen linear map plus a low-rank one."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear, rank, scale)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) + super().forward(x)
        return out if self.personal is None else out + self.personal(x)


class Head(ClientModule):
    """The classifier on the pooled features; it starts like ``nn.Linear``, so that a frozen initial head is of use."""

    def __init__(self, dim: int, classes: int, group: str = "head") -> None:
        super().__init__(group)
        self.weight, self.bias = trainable(dim, classes), trainable(classes)

    def init_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"weight": uniform(self.weight.shape, 1 / math.sqrt(self.weight.shape[0]), generator)}

    def forward(self, features: Tensor) -> Tensor:
        """``[C, b, k]`` to ``[C, b, classes]``."""
        logits = clientwise(features.flatten(0, 1), self.weight, self.bias).unflatten(0, features.shape[:2])
        return logits if self.personal is None else logits + self.personal(features)


def attach(
    blocks: list[Any], kind: str, width: int, scale: float, targets: tuple[str, ...], personal: bool = False
) -> None:
    """Puts an adapter, and where asked a personal one beside it, into each of the given transformer blocks, in place.

    Raises:
        AttributeError: a block is not built of ``attn.qkv``, ``mlp.fc1`` and ``mlp.fc2``.
    """

    def lora(linear: nn.Linear) -> LoraLinear:
        adapted = LoraLinear(linear, width, scale)
        if personal:
            adapted.personal = LowRank(linear, width, scale, "adapter.personal")
        return adapted

    def bottleneck(dim: int) -> Bottleneck:
        adapter = Bottleneck(dim, width, scale)
        if personal:
            adapter.personal = Bottleneck(dim, width, scale, "adapter.personal")
        return adapter

    for block in blocks:
        if kind == "lora":
            if "qkv" in targets:
                block.attn.qkv = lora(block.attn.qkv)
            if "mlp" in targets:
                block.mlp.fc1, block.mlp.fc2 = lora(block.mlp.fc1), lora(block.mlp.fc2)
        else:
            wrapper = SequentialMlp if kind == "sequential" else ParallelMlp
            block.mlp = wrapper(block.mlp, bottleneck(block.mlp.fc1.in_features))
