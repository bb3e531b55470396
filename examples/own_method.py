"""Compose a method from parts, with a divergence of your own, without touching the package.

python examples/own_method.py runs/demo --updates 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import varkd
from varkd.parts import Data, MixedRollout, Mixture, Share


def hellinger(student_NK: Tensor, teacher_NK: Tensor, rows: object) -> Tensor:
    """1 - sum sqrt(p q) of log-probabilities: bounded, and gentle where the student has no mass."""
    del rows
    return 1 - (0.5 * (student_NK + teacher_NK)).exp().sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    half = Mixture((Share(Data(), 0.5), Share(MixedRollout(0.25, 0.75), 0.5)))
    own: Any = hellinger  # any callable of that signature; the type names the ones that recipes know
    method = varkd.Method((varkd.Term("hellinger", own, generated_only=True),), half)
    teacher, student = varkd.load(args.demo / "teacher"), varkd.load(args.demo / "start")
    codes = varkd.CodeDataset(args.demo / "codes")
    distiller = varkd.Distiller(method, student, teacher, codes.tokenizer, updates=args.updates)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for batch in varkd.DataLoader(codes, batch_size=32, updates=args.updates, device=student.device):
        loss, stats = distiller(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        distiller.update(loss, stats)
        losses.append(float(loss.detach()))
    print(f"Hellinger distance {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
