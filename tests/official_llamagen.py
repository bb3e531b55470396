"""A folder laid out like a checkout of LlamaGen: our own slow reference under the official names, without a cache.

It recomputes the whole sequence for every code, so what it draws is right by construction, and it answers the calls
that `varkd.bench.official` makes of the official code.
"""

from __future__ import annotations

from pathlib import Path

GPT = '''
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from utils.drop_path import DropPath


@dataclass
class ModelArgs:
    dim: int
    n_layer: int
    n_head: int
    vocab_size: int
    block_size: int
    num_classes: int


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return (x.float() * scale).to(x.dtype) * self.weight


class Layer(nn.Module):
    def __init__(self, args, width):
        super().__init__()
        self.heads = args.n_head
        self.attention = nn.Module()
        self.attention.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.attention.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.feed_forward = nn.Module()
        for name, sizes in {"w1": (args.dim, width), "w3": (args.dim, width), "w2": (width, args.dim)}.items():
            setattr(self.feed_forward, name, nn.Linear(*sizes, bias=False))
        self.attention_norm, self.ffn_norm = Norm(args.dim), Norm(args.dim)

    def forward(self, x, angles):
        q, k, v = self.attention.wqkv(self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = (turn(y.float(), angles).to(v.dtype) for y in (q, k))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention.wo(seen)
        y, ffn = self.ffn_norm(x), self.feed_forward
        return x + ffn.w2(F.silu(ffn.w1(y)) * ffn.w3(y))


def turn(x, angles):
    """Adjacent pairs as complex numbers, multiplied by e^(i angle); the class slot by 0."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angles[: x.shape[2]]
    return torch.view_as_real(turned).flatten(-2)


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        width = -(-int(8 * args.dim / 3) // 256) * 256
        self.num_classes, self.length = args.num_classes, args.block_size
        self.cls_embedding = nn.Module()
        self.cls_embedding.embedding_table = nn.Embedding(args.num_classes + 1, args.dim)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args, width) for _ in range(args.n_layer))
        self.norm, self.output = Norm(args.dim), nn.Linear(args.dim, args.vocab_size, bias=False)
        side, lanes = round(args.block_size**0.5), args.dim // args.n_head // 4
        speed = 10000 ** -(torch.arange(lanes) / lanes)
        at = torch.arange(side)
        rows, columns = at.repeat_interleave(side), at.repeat(side)
        grid = torch.cat([rows[:, None] * speed, columns[:, None] * speed], dim=1)
        self.freqs_cis = torch.cat([torch.zeros(1, 2 * lanes), torch.polar(torch.ones_like(grid), grid)])

    def forward(self, idx, cond_idx):
        first = self.cls_embedding.embedding_table(cond_idx).unsqueeze(1)
        x = torch.cat([first, self.tok_embeddings(idx)], dim=1)
        for layer in self.layers:
            x = layer(x, self.freqs_cis)
        return self.output(self.norm(x)).float(), None
'''

GENERATE = """
import torch


@torch.no_grad()
def generate(model, cond, length, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True):
    both, codes = torch.cat([cond, torch.full_like(cond, model.num_classes)]), cond.new_zeros(len(cond), 0)
    for _ in range(length):
        given, null = model(torch.cat([codes, codes]), both)[0][:, -1].chunk(2)
        logits = null + (given - null) * cfg_scale
        one = torch.multinomial(logits.softmax(-1), 1) if sample_logits else logits.argmax(-1, keepdim=True)
        codes = torch.cat([codes, one], dim=1)
    return codes
"""


def write_checkout(folder: Path) -> Path:
    files = {
        "autoregressive/models/gpt.py": GPT,
        "autoregressive/models/generate.py": GENERATE,
        "utils/drop_path.py": "class DropPath:\n    pass\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
