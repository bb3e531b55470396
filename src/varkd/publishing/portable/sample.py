"""Draw images from this folder with onnxruntime alone: no PyTorch, no varkd.

    pip install numpy onnxruntime pillow
    python sample.py --labels 0 1 2 3 --seed 0 --out samples.png

The same labels, seed and settings give the same codes as `varkd.generate`: image i costs one uniform number per code,
which are a function of (seed, i), pushed through the inverse CDF.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent


def uniform(seed: int, row: int, length: int) -> NDArray[np.float32]:
    """The numbers of one image in [0, 1): 24 bits each from a Mersenne Twister, as PyTorch draws them on the CPU."""
    digest = hashlib.blake2b(f"{seed}/0/sample/{row}".encode(), digest_size=8).digest()
    twister = np.random.MT19937()
    twister._legacy_seeding((int.from_bytes(digest, "little") >> 1) & 0xFFFFFFFF)
    return (twister.random_raw(length) & 0xFFFFFF).astype(np.float32) / np.float32(2**24)


def draw(logits_BV: NDArray[np.float32], uniform_B: NDArray[np.float32], sampler: dict[str, Any]) -> NDArray[np.int64]:
    """Codes (B,): temperature, top-k, top-p, then the place where the CDF passes each uniform number."""
    if sampler["temperature"] == 0:
        return logits_BV.argmax(-1)
    logits = logits_BV / np.float32(max(sampler["temperature"], 1e-5))
    if 0 < sampler["top_k"] < logits.shape[-1]:
        threshold = np.sort(logits, axis=-1)[:, -sampler["top_k"], None]
        logits = np.where(logits < threshold, -np.inf, logits)
    if sampler["top_p"] < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        mass = np.cumsum(softmax(np.take_along_axis(logits, order, -1)), axis=-1)
        above = np.concatenate([np.zeros_like(mass[:, :1]), mass[:, :-1]], axis=-1)  # strictly before each code
        dropped = np.zeros(logits.shape, bool)
        np.put_along_axis(dropped, order, above > sampler["top_p"], -1)
        logits = np.where(dropped, -np.inf, logits)
    cdf = np.cumsum(softmax(logits).astype(np.float64), axis=-1)
    target = uniform_B.astype(np.float64) * cdf[:, -1]
    return (cdf <= target[:, None]).sum(-1)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def sample(labels: list[int], seed: int = 0, **changes: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 (N, H, W, C) and their codes (N, L); `changes` are temperature, top_k, top_p and guidance."""
    about = json.loads((HERE / "about.json").read_text())
    sampler = {**about["sampler"], **changes}
    step, decoder = (onnxruntime.InferenceSession(str(HERE / name)) for name in ("step.onnx", "decoder.onnx"))
    num, length, null = len(labels), about["grid"][0] * about["grid"][1], about["num_classes"]
    guided = sampler["guidance"] > 1
    rows = 2 * num if guided else num
    cache = np.zeros((about["layers"], 2, rows, about["heads"], length, about["head_dim"]), np.float32)
    noise_BL = np.stack([uniform(seed, row, length) for row in range(num)])
    codes_BL = np.zeros((num, length), np.int64)
    inputs = np.array(labels + [null] * num if guided else labels, np.int32)
    for slot in range(length):
        feeds = {"input": inputs, "slot": np.array([slot], np.int32), "cache": cache}
        outputs: Any = step.run(None, feeds)
        logits_BV, new = outputs
        cache[..., slot, :] = new[..., 0, :]
        if guided:
            conditional, other = np.split(logits_BV, 2)
            logits_BV = other + np.float32(sampler["guidance"]) * (conditional - other)
        codes_BL[:, slot] = draw(logits_BV, noise_BL[:, slot], sampler)
        inputs = np.tile(codes_BL[:, slot] + null + 1, 2 if guided else 1).astype(np.int32)
    decoded: Any = decoder.run(None, {"codes": codes_BL.astype(np.int32)})
    return decoded[0].transpose(0, 2, 3, 1), codes_BL


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw images with onnxruntime.")
    parser.add_argument("--labels", type=int, nargs="+", default=[0], help="one image for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples.png")
    for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("guidance", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help="default: see about.json")
    options = vars(parser.parse_args())
    labels, seed, out = options.pop("labels"), options.pop("seed"), options.pop("out")
    images, _ = sample(labels, seed, **{name: value for name, value in options.items() if value is not None})
    row = np.concatenate(list(images), axis=1)
    Image.fromarray(row if row.shape[2] == 3 else row[:, :, 0]).save(out)
    print(out)


if __name__ == "__main__":
    main()
