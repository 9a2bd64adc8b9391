"""The last block where only the class token is pooled: what no other token needs is not computed.

The other tokens enter the last block's attention, and leave it as one weighted sum a head. So neither keys nor values
of them are formed; with y_j the normalised tokens, y_0 that of the class, and weights a_j that sum to one,

    <q, W_K y_j + b_K>        = <W_K^T q, y_j> + what is the same for all j, and a softmax does not see
    sum_j a_j (W_V y_j + b_V) = W_V (sum_j a_j y_j) + b_V

which is two products of matrices for each image instead of two for each token. Equal but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models.lean import without_compiler

with without_compiler():
    from timm.models.vision_transformer import Attention, Block


def is_pooled_alone(backbone: Any, last: nn.Module) -> bool:
    """Whether the features are the class token's, and the last block is timm's ordinary one."""
    return type(last) is Block and backbone.global_pool == "token" and backbone.attn_pool is None


def of_last_block(block: Any, x: Tensor) -> Tensor:
    """The class token after the block: tokens ``[N, T, k]`` to ``[N, 1, k]``, that of ``block(x)``."""
    x = after_attention(block, x)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def after_attention(block: Any, x: Tensor) -> Tensor:
    """The class token after the block's attention: tokens ``[N, T, k]`` to ``[N, 1, k]``."""
    y = block.norm1(x)
    attended = _attended(block.attn, y) if _folds(block.attn) else block.attn(y)[:, :1]
    return x[:, :1] + block.drop_path1(block.ls1(attended))


def _folds(attn: Any) -> bool:
    """Whether keys and values are linear in the tokens, and the same for all clients."""
    plain = type(attn) is Attention and isinstance(attn.qkv, nn.Linear) and isinstance(attn.k_norm, nn.Identity)
    return plain and getattr(attn, "gate", None) is None


def _attended(attn: Any, y: Tensor) -> Tensor:
    """``attn(y)[:, :1]``, from normalised tokens ``[N, T, k]``."""
    each = (3, attn.num_heads, attn.head_dim)
    W_Q, W_K, W_V = attn.qkv.weight.unflatten(0, each)  # [heads, k / heads, k]
    b_Q, _, b_V = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, each).flatten(1)
    q = attn.q_norm(F.linear(y[:, 0], W_Q.flatten(0, 1), b_Q).unflatten(1, each[1:])) * attn.scale
    asked = torch.bmm(q.transpose(0, 1), W_K).transpose(0, 1)  # [N, heads, k]
    mixed = torch.bmm(torch.bmm(asked, y.mT).softmax(-1), y)
    values = torch.bmm(mixed.transpose(0, 1), W_V.mT).transpose(0, 1).flatten(1)
    out = attn.proj(attn.norm(values if b_V is None else values + b_V))
    return attn.proj_drop(out)[:, None]
