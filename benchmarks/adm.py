"""Speed of ADM's numbers on this machine: features in images/s, FID of 50,000 x 2,048, precision and recall.

Weights and images are random: the work is the same. Beside our network runs a plain one (a convolution, batch
normalization and ReLU a unit, no folding), which is what torch-fidelity's module does, and that module itself where it
is installed.

python benchmarks/adm.py [--images 64] [--num 50000] [--reference 10000] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkd.evaluate.inception import _EPS, POOL_DIM, Inception, _Conv, expected_shapes, normalized, tf1_resize
from varkd.evaluate.manifolds import precision_recall
from varkd.evaluate.moments import frechet, frechet_interval, gaussian_of

SIZE = 256


def random_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in expected_shapes().items():
        scale = (2 / max(1, shape[1] * shape[2] * shape[3])) ** 0.5 if len(shape) == 4 else 0.02
        noise = torch.randn(shape, generator=generator) * scale
        state[name] = noise.abs() + 0.5 if name.endswith(("bn.weight", "running_var")) else noise
    return state


class Unit(nn.Module):
    """Convolution, batch normalization and ReLU, one after the other."""

    def __init__(self, fused: _Conv) -> None:
        super().__init__()
        self.stride, self.padding, self.widths = fused.stride, fused.padding, fused.widths
        self.conv = nn.Parameter(fused.weight.contiguous(), requires_grad=False)
        self.bn = nn.BatchNorm2d(len(fused.weight), eps=_EPS).eval().requires_grad_(False)

    def linear(self, hidden: Tensor) -> Tensor:
        parts = [F.conv2d(hidden, weight, None, self.stride, self.padding) for weight in self.conv.split(self.widths)]
        return self.bn(torch.cat(parts, 1) if len(parts) > 1 else parts[0])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).relu_()

    def pooled(self, hidden: Tensor) -> list[Tensor]:
        *others, last = self.linear(hidden).split(self.widths, dim=1)
        return [*(other.relu() for other in others), F.avg_pool2d(last, 3, 1, 1, count_include_pad=False).relu_()]


def plain(net: Inception) -> Callable[[Tensor], object]:
    """The same network without what makes ours fast, in the default memory layout."""

    def replaced(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, _Conv):
                setattr(module, name, Unit(child))
            else:
                replaced(child)

    replaced(net)

    @torch.inference_mode()
    def run(images: Tensor) -> object:
        hidden = net.mixed_6a(net.mixed_5(net.stem(normalized(tf1_resize(images)))))
        for block in net.mixed_6.values():
            hidden = block(hidden)
        return net.mixed_7c(net.mixed_7b(net.mixed_7a(hidden))).mean((2, 3))

    return run


def rates(runs: dict[str, Callable[[Tensor], object]], num: int, batch: int) -> dict[str, float]:
    """Images a second of each, the best of four passes over `num` images; they take turns, as others may be busy."""
    images = torch.randint(0, 256, (num, 3, SIZE, SIZE), dtype=torch.uint8)
    best = dict.fromkeys(runs, 0.0)
    for turn in range(5):
        for name, run in runs.items():
            begun = time.perf_counter()
            for rows in images[: batch if turn == 0 else num].split(batch):
                run(rows)
            if turn > 0:
                best[name] = max(best[name], num / (time.perf_counter() - begun))
    return best


def fidelity() -> Callable[[Tensor], object] | None:
    """torch-fidelity's network with random weights, if the package is installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return None
    from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
        FeatureExtractorInceptionV3,
    )

    path = "weights-random.pth"
    torch.save(random_state(), path)
    module = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=path).eval()
    return torch.inference_mode()(module)


def features(num: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(64, POOL_DIM, generator=torch.Generator().manual_seed(9)) * 0.05
    found = torch.empty(num, POOL_DIM)
    for rows in found.split(1000):
        rows.copy_(torch.randn(len(rows), 64, generator=generator) @ basis + 0.3 + shift)
        rows.add_(torch.randn(rows.shape, generator=generator), alpha=0.1).relu_()
    return found


def timed(name: str, run: Callable[[], object]) -> None:
    reset_peak()
    begun = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - begun
    print(f"{name}: {seconds:.1f} s, peak {peak_since_reset():.2f} GB   {found}", flush=True)


def reset_peak() -> None:
    """Forget the process's highest memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> float:
    """GB that the process held at most since then."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=64, help="for the features")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--num", type=int, default=50_000, help="samples of FID, precision and recall")
    options.add_argument("--reference", type=int, default=10_000)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    runs: dict[str, Callable[[Tensor], object]] = {
        "ours": Inception(random_state(), "random"),
        "a plain module": plain(Inception(random_state(), "random")),
    }
    if (other := fidelity()) is not None:
        runs["torch-fidelity's module"] = other
    else:
        print("torch-fidelity is not installed: not compared")
    found = rates(runs, chosen.images, chosen.batch)
    for name, images in found.items():
        print(f"features at {SIZE} pixels, {name}: {images:.1f} images/s; ours is {found['ours'] / images:.2f} x")
    if not chosen.num:
        return
    samples, real = features(chosen.num, 0), features(chosen.reference, 1, 0.01)
    sizes = f"{chosen.num} x {POOL_DIM}"
    against = gaussian_of(real)
    timed(f"FID, {sizes}", lambda: frechet(gaussian_of(samples), against))
    own = gaussian_of(samples)
    timed("its interval", lambda: frechet_interval(samples, own, against, 0.0))
    timed(f"precision and recall, {chosen.num} against {chosen.reference}", lambda: precision_recall(real, samples))


if __name__ == "__main__":
    main()
