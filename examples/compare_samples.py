"""The same labels and noise through several models, one row of pictures each.

python examples/compare_samples.py runs/demo/codes grid.png runs/demo/teacher runs/demo/kd runs/demo/varkd
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import varkd
from varkd.pictures import labeled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    tokenizer, rows = varkd.CodeDataset(args.codes).tokenizer, {}
    for folder in args.models:
        model, sampler = varkd.load(folder), varkd.Sampler(temperature=args.temperature)
        labels = [label % model.num_classes for label in range(10)]
        images = varkd.generate(model, tokenizer, labels, sampler=sampler, seed=0)
        rows[folder.name] = images.permute(0, 2, 3, 1).numpy()
    Image.fromarray(labeled(rows)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
