"""Updates per second and peak memory of each method, in one run: a LlamaGen teacher and student with random weights.

python benchmarks/methods.py --device cuda --precision bf16          # a 24x1024 teacher, a 12x768 student, 16x16 codes
python benchmarks/methods.py --layers 2 3 --dims 48 96 --grid 7 --vocab 256 --batch 8 --updates 3     # a minute of CPU
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import varkd
from varkd.train.compiling import compile_blocks

METHODS = ("ce", "kd", "kd_reverse", "gkd_prefix", "varkd_weight", "varkd_weight_groups", "varkd", "best_of_n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--layers", type=int, nargs=2, default=(12, 24), metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--dims", type=int, nargs=2, default=(768, 1024), metavar=("STUDENT", "TEACHER"))
    for name, default in {"grid": 16, "vocab": 16384, "batch": 32, "updates": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as train.compile does")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    args = parser.parse_args()
    common = {"vocab_size": args.vocab, "num_classes": 1000, "grid": (args.grid, args.grid)}
    student, teacher = (
        varkd.build("llamagen", {**common, "num_layers": layers, "dim": dim, "num_heads": max(1, dim // 64)}).to(
            args.device
        )
        for layers, dim in zip(args.layers, args.dims, strict=True)
    )
    teacher.eval().requires_grad_(False)
    if args.compile:
        compile_blocks(student, teacher)
    draw = torch.Generator().manual_seed(0)
    codebook_VE = torch.nn.functional.normalize(torch.randn(args.vocab, 8, generator=draw), dim=1)
    codes_BL = torch.randint(args.vocab, (args.batch, args.grid**2), generator=draw)
    batch = varkd.Batch(codes_BL, torch.zeros(args.batch, dtype=torch.long), torch.arange(args.batch)).to(args.device)
    place = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{place}, torch {torch.__version__}, {args.precision}, batch {args.batch}, {args.grid}x{args.grid} codes of "
          f"{args.vocab}; student {size(student)}M, teacher {size(teacher)}M parameters")  # fmt: skip
    print("method          updates/s   slowdown   peak GiB")
    fastest = None
    for name in args.methods:
        seconds, peak = measure(name, student, teacher, codebook_VE, batch, args)
        fastest = fastest or seconds
        print(f"{name:15s} {1 / seconds:9.3f} {seconds / fastest:9.2f}x {peak:10.1f}", flush=True)


def size(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def measure(
    name: str, student: varkd.Backbone, teacher: varkd.Backbone, codebook_VE: torch.Tensor, batch: varkd.Batch,
    args: argparse.Namespace,
) -> tuple[float, float]:  # fmt: skip
    """Mean seconds of an update after two to warm up (a mean: best_of_n samples in every eighth only), peak GiB."""
    cuda = args.device == "cuda"
    distiller = varkd.Distiller(
        name, student, teacher, codebook_VE, updates=100, precision=args.precision, compile=args.compile
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.updates + 2):  # decodes are captured as graphs in the second
        begun = time.perf_counter()
        loss, stats = distiller(batch)
        loss.backward()
        student.zero_grad(set_to_none=True)
        distiller.update(loss, stats)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.fmean(seconds[2:]), torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


if __name__ == "__main__":
    main()
