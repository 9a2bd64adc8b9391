"""The class token after the last block, without keys and values of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from fedsim.models.adapters import attach
from fedsim.models.class_token import _folds, of_last_block

OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"qkv_bias": True}, True),
    ({"qkv_bias": True, "init_values": 0.5, "scale_attn_norm": True}, True),
    ({"qk_norm": True}, False),  # keys that are no linear map of the tokens
    ({"attn_layer": "diff"}, False),
]


def random_block(options: dict[str, Any]) -> Block:
    torch.manual_seed(0)
    block = Block(24, num_heads=3, norm_layer=nn.LayerNorm, **options).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.requires_grad_(False)


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize(("options", "folds"), OPTIONS)
def test_it_is_the_block_s_first_token(options: dict[str, Any], folds: bool) -> None:
    block, tokens = random_block(options), torch.randn(4, 7, 24, dtype=torch.float64)
    assert _folds(block.attn) is folds
    found = []
    for compute in (of_last_block, lambda block, x: block(x)[:, :1]):
        x = tokens.clone().requires_grad_()
        out = compute(block, x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found.append((out.detach(), gradient))
    for some, all_tokens in zip(*found, strict=True):
        assert some.shape == all_tokens.shape
        torch.testing.assert_close(some, all_tokens, atol=1e-10, rtol=1e-10)
    assert (found[0][1][:, 1:].norm(dim=2) > 0).all()  # the other tokens do matter


def test_keys_that_clients_adapt_are_not_folded() -> None:
    block = random_block({})
    attach([block], "lora", 2, 1.0, ("qkv", "mlp"))
    assert not _folds(block.attn)


def test_neither_keys_nor_values_are_formed() -> None:
    block, seen = random_block({}), []
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    of_last_block(block, torch.randn(4, 7, 24, dtype=torch.float64))
    assert sum(seen) == 24 + 1  # the projection of one token each, [4, 24], and the MLP of one, [4, 1, 96]
