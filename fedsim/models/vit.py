"""The frozen timm vision transformer with clients' adapters and heads.

``VitModel`` runs a block of C clients as one batch of C x b images: the backbone is frozen and shared, and only
adapters and heads see the client axis. A client's parameters come as one row ``[C, d]``, viewed by the layout, never
copied.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsim.config import AdapterConfig, ModelConfig
from fedsim.errors import ConfigError, WeightsError, nearest
from fedsim.layout import Layout
from fedsim.models import class_token
from fedsim.models.adapters import ClientModule, Head, SequentialMlp, attach
from fedsim.models.frozen import freeze, unpacked
from fedsim.models.lean import without_compiler

with without_compiler():
    import timm
    from timm.models.vision_transformer import Block, checkpoint_filter_fn

EXTRA = ("adapter.personal", "head.personal")
"""Groups that an algorithm may add to the row (``Algorithm.extra``)."""


class AdaptedVit(nn.Module):
    """The timm model with adapters in its blocks and a head on its pooled features: the module behind a row.

    Attributes:
        prefix: how many blocks, from the first, carry no adapter: they give the same tokens for every client.
    """

    def __init__(self, backbone: Any, adapter: AdapterConfig, classes: int, extra: tuple[str, ...] = ()) -> None:
        """Takes the backbone over; ``extra``: what is there twice, of ``EXTRA``.

        Raises:
            ConfigError: its blocks are not built as the adapter needs them, or an extra piece is unknown.
        """
        super().__init__()
        for group in extra:
            if group not in EXTRA:
                raise ConfigError([f"algorithm: unknown extra piece {group!r}{nearest(group, EXTRA)}"])
        freeze(backbone)
        blocks = list(backbone.blocks)
        self.prefix = len(blocks) - adapter.count(len(blocks))
        try:
            personal = "adapter.personal" in extra
            attach(blocks[self.prefix :], adapter.kind, adapter.width, adapter.scale, adapter.targets, personal)
        except AttributeError as error:
            name = backbone.pretrained_cfg["architecture"]
            raise ConfigError([f"adapter: the blocks of {name!r} have no {error.name!r} to adapt"]) from None
        self.backbone = backbone
        self.head = Head(backbone.num_features, classes)
        if "head.personal" in extra:
            self.head.personal = Head(backbone.num_features, classes, "head.personal")

    def clients_modules(self) -> list[tuple[str, ClientModule]]:
        """``(name, module)`` of adapters and heads; those that are there for the second time come last."""
        found = [(name, module) for name, module in self.named_modules() if isinstance(module, ClientModule)]
        return sorted(found, key=lambda pair: pair[1].group in EXTRA)

    def trainables(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """``(name, group, parameter)`` of all that a client trains."""
        for prefix, module in self.clients_modules():
            for name, parameter in module.named_parameters(recurse=False):
                group = f"{module.group}.{name}" if name in ("A", "B") else module.group
                yield f"{prefix}.{name}", group, parameter

    def embed(self, images: Tensor) -> Tensor:
        """``[N, 3, s, s]`` to what no adapter has changed, ``[N, P, T, k]``: the tokens before the first of them.

        P is 2 where the first block with an adapter is timm's ordinary one, and has it at its MLP: the tokens after the
        block's attention, and what the frozen MLP makes of them. If no other block follows and only the class token is
        pooled, it is the only one (T = 1). Else P is 1: the tokens that enter that block.
        """
        tokens = self.backbone.patch_embed(images)
        tokens = self.backbone.norm_pre(self.backbone.patch_drop(self.backbone._pos_embed(tokens)))
        tokens = self.backbone.blocks[: self.prefix](tokens)
        if not self.opens_at_mlp:
            return tokens[:, None]
        first, *more = self.backbone.blocks[self.prefix :]
        if not more and class_token.is_pooled_alone(self.backbone, first):
            tokens = class_token.after_attention(first, tokens)
        else:
            tokens = tokens + first.drop_path1(first.ls1(first.attn(first.norm1(tokens))))
        return torch.stack([tokens, first.mlp.mlp(first.norm2(tokens))], 1)

    def forward(self, embedded: Tensor, pooled: bool) -> Tensor:
        """``embed``'s ``[C, b, P, T, k]`` to features ``[C, b, k]`` (``pooled``) or logits ``[C, b, classes]``."""
        last = self.backbone.norm(self._blocks(embedded.flatten(0, 1)))
        features = self.backbone.forward_head(last, pre_logits=True).unflatten(0, embedded.shape[:2])
        return features if pooled else self.head(features)

    @property
    def opens_at_mlp(self) -> bool:
        """Whether the first block with an adapter is the same for all clients up to its MLP's output."""
        first = self.backbone.blocks[self.prefix : self.prefix + 1]
        return any(type(block) is Block and isinstance(block.mlp, SequentialMlp) for block in first)

    def _blocks(self, embedded: Tensor) -> Tensor:
        """``[N, P, T, k]`` through the blocks with adapters: all tokens, or only the class's if no other is pooled."""
        blocks, tokens = self.backbone.blocks[self.prefix :], embedded[:, 0]
        if self.opens_at_mlp:
            first, blocks = blocks[0], blocks[1:]
            tokens = tokens + first.drop_path2(first.ls2(first.mlp.adapted(first.norm2(tokens), embedded[:, 1])))
        if len(blocks) and class_token.is_pooled_alone(self.backbone, blocks[-1]):
            return class_token.of_last_block(blocks[-1], blocks[:-1](tokens))
        return blocks(tokens)


class Pixels:
    """From stored images to the backbone's input: scaled to its size, and normalised as its weights want it."""

    def __init__(self, model: ModelConfig, weights: Mapping[str, Any], device: str = "cpu") -> None:
        """``weights``: what timm knows of them (``pretrained_cfg``); the configuration's mean and std come first."""
        mean = weights["mean"] if model.mean is None else [model.mean] * 3
        std = weights["std"] if model.std is None else [model.std] * 3
        self.mean, self.std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (mean, std))
        self.size = (model.img_size, model.img_size)

    def __call__(self, images: Tensor) -> Tensor:
        """``[..., 3, px, px] uint8`` to ``[..., 3, s, s] float32``."""
        pixels = images.to(self.mean.device).float().div_(255)
        if pixels.shape[-2:] != self.size:
            flat = F.interpolate(pixels.flatten(0, -4), self.size, mode="bilinear", align_corners=False)
            pixels = flat.unflatten(0, images.shape[:-3])
        return (pixels - self.mean) / self.std


class VitModel:
    """A block's model: ``features`` and ``logits`` of C clients from their rows ``[C, d] float32``.

    Attributes:
        layout: names and groups of the row.
        device: where it computes.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: AdapterConfig,
        classes: int,
        frozen: Mapping[str, np.ndarray] | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        extra: tuple[str, ...] = (),
    ) -> None:
        """Builds it; ``frozen`` are backbone tensors that are shared, not copied (see ``frozen_arrays``, ``halved``).

        ``extra``: what the row has beside an adapter and a head (``Algorithm.extra``).
        """
        backbone = create_backbone(model) if frozen is None else filled(model, unpacked(as_tensors(frozen)))
        self.module = AdaptedVit(backbone, adapter, classes, extra).eval().to(device)
        self.layout = Layout.of([(name, tuple(p.shape), group) for name, group, p in self.module.trainables()])
        self.device = torch.device(device)
        self.pixels = Pixels(model, backbone.pretrained_cfg, device)
        self.bf16 = precision == "bf16"
        if self.bf16 and self.device.type == "cpu":
            _plain_attention(backbone)

    def initial(self, generator: torch.Generator) -> Tensor:
        """A new client row ``[d]``: adapters that change nothing yet, and a random head."""
        values = {name: torch.zeros(parameter.shape) for name, _, parameter in self.module.trainables()}
        for prefix, module in self.module.clients_modules():
            values |= {f"{prefix}.{name}": value for name, value in module.init_values(generator).items()}
        return self.layout.flatten(values)

    def features(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Pooled features ``[C, b, k]``; inputs as for ``logits``."""
        return self._forward(rows, inputs, pooled=True)

    def logits(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[C, b, classes] float32`` of images ``[C, b, 3, px, px] uint8`` or of their ``embed``."""
        return self._forward(rows, inputs, pooled=False)

    def head(self, rows: Tensor, features: Tensor, group: str = "head") -> Tensor:
        """Logits ``[C, b, classes] float32`` of features ``[C, b, k]`` under the heads of that group alone."""
        views = self.layout.views(rows)
        return torch.baddbmm(views[f"{group}.bias"].unsqueeze(1), features, views[f"{group}.weight"])

    def embed(self, images: Tensor) -> Tensor:
        """The frozen prefix: ``[..., 3, px, px] uint8`` to ``[..., P, T, k]``, the same for every client."""
        # No gradient is wanted below the lowest adapter.
        with torch.no_grad(), self._autocast():
            return self.module.embed(self.pixels(images).flatten(0, -4)).unflatten(0, images.shape[:-3])

    def _forward(self, rows: Tensor, inputs: Tensor, pooled: bool) -> Tensor:
        embedded = self.embed(inputs) if inputs.dtype == torch.uint8 else inputs.to(self.device).float()
        with self._autocast():
            return functional_call(self.module, self.layout.views(rows), (embedded, pooled)).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _plain_attention(backbone: Any) -> None:
    """Two products and a softmax instead of the fused attention: on CPUs, in bf16, a block is twice as fast so."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Tensors over the arrays' memory, which may be shared between processes: whoever writes must copy first."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(value) for name, value in arrays.items()}


def skeleton(model: ModelConfig) -> Any:
    """The timm model without classifier and without values (on torch's meta device); one image has passed through it.

    Raises:
        ConfigError: timm has no such model, it is no vision transformer, or it does not work with these options.
    """
    known = timm.list_models(module="vision_transformer")
    if model.name.split(".")[0] not in known:
        raise ConfigError([f"model.name: timm has no vision transformer {model.name!r}{nearest(model.name, known)}"])
    try:
        backbone = _hollow(model)
        with torch.device("meta"):
            features = backbone.eval()(torch.empty(1, 3, model.img_size, model.img_size))
        if features.shape != (1, backbone.num_features):
            raise ValueError(f"an image gives features of shape {tuple(features.shape)}")
    except Exception as error:  # timm passes options on to whatever layer takes them
        told = f"model: timm cannot make {model.name!r} with these options: {error}"
        raise ConfigError([" ".join(told.split())]) from None
    return backbone


def create_backbone(model: ModelConfig) -> Any:
    """The timm model without classifier, with timm's random initial values, drawn from the global generator.

    Raises:
        ConfigError: as ``skeleton``.
    """
    skeleton(model)
    return _timm(model)


def filled(model: ModelConfig, state: Mapping[str, Tensor]) -> Any:
    """The timm model without classifier over the given tensors, which are not copied; one that ``skeleton`` made."""
    backbone = _hollow(model)
    backbone.load_state_dict(state, assign=True)
    return backbone


def _hollow(model: ModelConfig) -> Any:
    # Without an image through it: on the meta device that imports torch's compiler, in every simulator.
    no_values: dict[str, Any] = {} if "weight_init" in model.options else {"weight_init": "skip"}
    with torch.device("meta"):
        return _timm(model, **no_values)


def _timm(model: ModelConfig, pretrained: bool = False, **more: Any) -> Any:
    given = {**more, **model.options}
    return timm.create_model(model.name, pretrained=pretrained, img_size=model.img_size, num_classes=0, **given)


def load_weights(backbone: Any, path: Path) -> None:
    """Loads a safetensors file into the backbone, resampling position embeddings; its classifier is left out.

    Raises:
        WeightsError: no such file, not safetensors, or tensors that are missing, unknown, or of another shape.
    """
    if not os.path.isfile(path):  # pathlib's raises where a name is too long
        raise WeightsError(f"model.weights: no file {str(path)!r}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise WeightsError(f"model.weights: {str(path)!r} is not a readable safetensors file: {error}") from None
    own = backbone.state_dict()
    missing, foreign = (
        sorted(own.keys() - state.keys()),
        sorted(state.keys() - own.keys() - {"head.weight", "head.bias"}),
    )
    if missing or foreign:
        raise WeightsError(
            f"model.weights: {str(path)!r} does not fit the model: "
            + "; ".join(f"{word} {names[0]!r} and {len(names) - 1} more" if len(names) > 1 else f"{word} {names[0]!r}"
                        for word, names in (("it lacks", missing), ("the model has no", foreign)) if names)
        )  # fmt: skip
    state = checkpoint_filter_fn({name: state[name] for name in own}, backbone)
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise WeightsError(
                f"model.weights: {str(path)!r} does not fit the model: tensor {name!r} has shape "
                f"{tuple(state[name].shape)}, the model's has {tuple(tensor.shape)}"
            )
    backbone.load_state_dict(state)


def load_backbone(model: ModelConfig) -> Any:
    """The backbone with its values: from timm's own pretrained weights, a file, or random ones.

    Raises:
        ConfigError: as ``skeleton``.
        WeightsError: the file does not fit, or timm's weights cannot be had.
    """
    if model.weights == "pretrained":
        skeleton(model)
        try:
            return _timm(model, pretrained=True)
        except Exception as error:  # timm and its hub raise whatever their network layers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise WeightsError(
                f"model.weights: timm's pretrained {model.name!r} cannot be loaded ({reason}); "
                "give a local file with model.weights=FILE.safetensors"
            ) from None
    backbone = create_backbone(model)
    if model.weights != "random":
        load_weights(backbone, Path(os.path.expanduser(model.weights)))
    return backbone


def frozen_arrays(backbone: Any) -> dict[str, np.ndarray]:
    """The backbone's tensors as arrays that processes share (numpy is zero-copy out of Ray's store; torch is not)."""
    return {name: tensor.detach().numpy() for name, tensor in backbone.state_dict().items()}


def checksum(frozen: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and values: what the run stood on."""
    digest = hashlib.sha256()
    for name in sorted(frozen):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(frozen[name]).tobytes())
    return digest.hexdigest()
