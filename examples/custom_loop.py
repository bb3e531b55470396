"""Distill in your own training loop. Needs a finished `varkd demo` (or your own run folders).

python examples/custom_loop.py runs/demo runs/my-student --updates 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import varkd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    teacher, student = varkd.load(args.demo / "teacher"), varkd.load(args.demo / "start")
    codes = varkd.CodeDataset(args.demo / "codes")
    distiller = varkd.Distiller("varkd", student, teacher, codes.tokenizer, updates=args.updates)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    stats = {}
    for batch in varkd.DataLoader(codes, batch_size=args.batch_size, updates=args.updates, device=student.device):
        loss, stats = distiller(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distiller.update(loss, stats)
    print({name: round(value, 4) for name, value in stats.items()})
    student.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
