"""A small language model, which the demo trains and the benchmarks time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

FEATURES, LAYERS, HEADS, CONTEXT, BATCH = 256, 2, 4, 256, 4


class Block(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Decoder(nn.Module):
    """All but the loss; the head is called by those ways that have logits, or lazy ones."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, FEATURES)
        self.position = nn.Parameter(torch.zeros(CONTEXT, FEATURES))
        self.blocks = nn.Sequential(*(Block(FEATURES, HEADS) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(FEATURES)
        self.lm_head = nn.Linear(FEATURES, vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=1 / FEATURES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embedding(ids) + self.position))
