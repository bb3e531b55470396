"""Deterministic inputs for the Inception-2015 / ADM evaluation goldens (numpy only).

Everything here is integer arithmetic on raw PCG64 words followed by one float64
multiplication and one cast, so the same bits come out on every platform and numpy
version (the raw stream of a numpy BitGenerator is a stability guarantee; its
distribution methods are not, so none is used).

    weights(seed)            -> {state_dict name: float32 array}   (torch layout, OIHW)
    image(seed, index, size) -> uint8 [size, size, 3]
    features(seed, name, n, d, ...) -> float32 [n, d]
    frechet_cases(seed), pr_cases(seed, (n_ref, n_sample)), is_features(seed, n): the metric cases
    sha256(array)            -> hex digest of dtype/shape/bytes

No file is read and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

__all__ = [
    "conv_table",
    "features",
    "frechet_cases",
    "image",
    "images",
    "is_features",
    "param_table",
    "pr_cases",
    "sha256",
    "weights",
]


# --------------------------------------------------------------------------- raw bits
def _raw(seed: int, name: str, count: int) -> np.ndarray:
    """`count` raw 64-bit words for (seed, name)."""
    bg = np.random.PCG64(np.random.SeedSequence([int(seed), zlib.crc32(name.encode("utf-8"))]))
    return bg.random_raw(count)


def _ints24(seed: int, name: str, count: int) -> np.ndarray:
    """`count` integers uniform in [0, 2**24), int64."""
    return (_raw(seed, name, count) >> np.uint64(40)).astype(np.int64)


# --------------------------------------------------------------------------- architecture
def conv_table() -> list[tuple[str, int, int, int, int]]:
    """(prefix, in_channels, out_channels, kernel_h, kernel_w) of all 94 conv+BN units."""
    t: list[tuple[str, int, int, int, int]] = []

    def c(name, i, o, kh=1, kw=1):
        t.append((name, i, o, kh, kw))

    c("Conv2d_1a_3x3", 3, 32, 3, 3)
    c("Conv2d_2a_3x3", 32, 32, 3, 3)
    c("Conv2d_2b_3x3", 32, 64, 3, 3)
    c("Conv2d_3b_1x1", 64, 80)
    c("Conv2d_4a_3x3", 80, 192, 3, 3)
    for blk, cin, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        c(f"{blk}.branch1x1", cin, 64)
        c(f"{blk}.branch5x5_1", cin, 48)
        c(f"{blk}.branch5x5_2", 48, 64, 5, 5)
        c(f"{blk}.branch3x3dbl_1", cin, 64)
        c(f"{blk}.branch3x3dbl_2", 64, 96, 3, 3)
        c(f"{blk}.branch3x3dbl_3", 96, 96, 3, 3)
        c(f"{blk}.branch_pool", cin, pool)
    c("Mixed_6a.branch3x3", 288, 384, 3, 3)
    c("Mixed_6a.branch3x3dbl_1", 288, 64)
    c("Mixed_6a.branch3x3dbl_2", 64, 96, 3, 3)
    c("Mixed_6a.branch3x3dbl_3", 96, 96, 3, 3)
    for blk, m in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        c(f"{blk}.branch1x1", 768, 192)
        c(f"{blk}.branch7x7_1", 768, m)
        c(f"{blk}.branch7x7_2", m, m, 1, 7)
        c(f"{blk}.branch7x7_3", m, 192, 7, 1)
        c(f"{blk}.branch7x7dbl_1", 768, m)
        c(f"{blk}.branch7x7dbl_2", m, m, 7, 1)
        c(f"{blk}.branch7x7dbl_3", m, m, 1, 7)
        c(f"{blk}.branch7x7dbl_4", m, m, 7, 1)
        c(f"{blk}.branch7x7dbl_5", m, 192, 1, 7)
        c(f"{blk}.branch_pool", 768, 192)
    c("Mixed_7a.branch3x3_1", 768, 192)
    c("Mixed_7a.branch3x3_2", 192, 320, 3, 3)
    c("Mixed_7a.branch7x7x3_1", 768, 192)
    c("Mixed_7a.branch7x7x3_2", 192, 192, 1, 7)
    c("Mixed_7a.branch7x7x3_3", 192, 192, 7, 1)
    c("Mixed_7a.branch7x7x3_4", 192, 192, 3, 3)
    for blk, cin in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        c(f"{blk}.branch1x1", cin, 320)
        c(f"{blk}.branch3x3_1", cin, 384)
        c(f"{blk}.branch3x3_2a", 384, 384, 1, 3)
        c(f"{blk}.branch3x3_2b", 384, 384, 3, 1)
        c(f"{blk}.branch3x3dbl_1", cin, 448)
        c(f"{blk}.branch3x3dbl_2", 448, 384, 3, 3)
        c(f"{blk}.branch3x3dbl_3a", 384, 384, 1, 3)
        c(f"{blk}.branch3x3dbl_3b", 384, 384, 3, 1)
        c(f"{blk}.branch_pool", cin, 192)
    return t


def param_table() -> list[tuple[str, tuple[int, ...]]]:
    """All 472 tensors of the 2015 state dict, in torch-fidelity's naming."""
    out: list[tuple[str, tuple[int, ...]]] = []
    for name, i, o, kh, kw in conv_table():
        out.append((f"{name}.conv.weight", (o, i, kh, kw)))
        for k in ("weight", "bias", "running_mean", "running_var"):
            out.append((f"{name}.bn.{k}", (o,)))
    out.append(("fc.weight", (1008, 2048)))
    out.append(("fc.bias", (1008,)))
    return out


# --------------------------------------------------------------------------- weights
_S24 = 2.0**-24
_SQRT12 = 3.4641016151377544  # sqrt(12): uniform[0,1) has variance 1/12
CONV_GAIN = 1.7  # chosen by measurement: activations keep std of order 1
FC_GAIN = 4.0


def _centered(seed: int, name: str, rows: int, cols: int) -> np.ndarray:
    """[rows, cols] integers with every row summing to (almost exactly) zero."""
    k = _ints24(seed, name, rows * cols).reshape(rows, cols)
    return k - (k.sum(axis=1, dtype=np.int64) // cols)[:, None]


def _range(seed: int, name: str, n: int, lo: float, hi: float) -> np.ndarray:
    return (lo + (hi - lo) * (_ints24(seed, name, n).astype(np.float64) * _S24)).astype(np.float32)


def weights(seed: int) -> dict[str, np.ndarray]:
    """Random weights under the 2015 names. Kernels are zero-sum per output channel, so the
    common positive offset that ReLU networks build up does not drown the image content."""
    sd: dict[str, np.ndarray] = {}
    for name, i, o, kh, kw in conv_table():
        fan_in = i * kh * kw
        key = f"{name}.conv.weight"
        k = _centered(seed, key, o, fan_in).astype(np.float64)
        scale = _S24 * _SQRT12 * CONV_GAIN / np.sqrt(np.float64(fan_in))
        sd[key] = (k * scale).astype(np.float32).reshape(o, i, kh, kw)
        sd[f"{name}.bn.weight"] = _range(seed, f"{name}.bn.weight", o, 0.8, 1.2)
        sd[f"{name}.bn.bias"] = _range(seed, f"{name}.bn.bias", o, -0.2, 0.2)
        sd[f"{name}.bn.running_mean"] = _range(seed, f"{name}.bn.running_mean", o, -0.2, 0.2)
        sd[f"{name}.bn.running_var"] = _range(seed, f"{name}.bn.running_var", o, 0.7, 1.4)
    k = _centered(seed, "fc.weight", 1008, 2048).astype(np.float64)
    sd["fc.weight"] = (k * (_S24 * _SQRT12 * FC_GAIN / np.sqrt(np.float64(2048)))).astype(np.float32)
    sd["fc.bias"] = _range(seed, "fc.bias", 1008, -2.0, 2.0)
    return sd


# --------------------------------------------------------------------------- images
def image(seed: int, index: int, size: int) -> np.ndarray:
    """A structured uint8 image: flat blocks + a ramp + noise whose amount varies with index."""
    b = 4 + (index * 3) % 13  # blocks per side: 4..16
    blocks = (_raw(seed, f"img{index}.blocks", b * b * 3) >> np.uint64(56)).astype(np.int64).reshape(b, b, 3)
    pos = (np.arange(size, dtype=np.int64) * b) // size
    img = blocks[pos][:, pos]
    ramp = (np.arange(size, dtype=np.int64) * 96) // max(size - 1, 1) - 48
    img = img + (ramp[:, None, None] if index % 2 else ramp[None, :, None])
    noise = (_raw(seed, f"img{index}.noise", size * size * 3) >> np.uint64(58)).astype(np.int64).reshape(size, size, 3)
    img = img + ((noise - 32) * (index % 4)) // 2
    return np.clip(img, 0, 255).astype(np.uint8)


def images(seed: int, first: int, count: int, size: int) -> np.ndarray:
    return np.stack([image(seed, first + j, size) for j in range(count)])


# --------------------------------------------------------------------------- features
def features(
    seed: int,
    name: str,
    n: int,
    d: int,
    *,
    scale: float = 0.4,
    offset: float = 0.0,
    rank: int | None = None,
    decay: float = 0.0,
    relu: bool = True,
    mix: str | None = None,
) -> np.ndarray:
    """[n, d] float32 features: correlated, optionally rank-deficient or badly scaled.

    x = z @ M with uniform integer z and M (12 bits each), all exact in int64. Sets that
    name the same `mix` share M, so they lie in the same subspace.
    Column j is then multiplied by 2**-int(decay*j) (an exact power of two).
    """
    r = d if rank is None else rank
    z = (_raw(seed, f"{name}.z", n * r) >> np.uint64(52)).astype(np.int64).reshape(n, r) - 2048
    m = (_raw(seed, f"{mix or name}.m", r * d) >> np.uint64(52)).astype(np.int64).reshape(r, d) - 2048
    x = (z @ m).astype(np.float64)
    x = x * (12.0 / (4096.0 * 4096.0) / np.sqrt(np.float64(r)))  # unit variance
    x = x * scale + offset
    if relu:
        x = np.maximum(x, 0.0)
    if decay:
        x = x * np.exp2(-np.floor(decay * np.arange(d)))
    return x.astype(np.float32)


# --------------------------------------------------------------------------- case tables
def frechet_cases(fs):
    """name -> (features_1, features_2); all float32, all from features()."""
    f = lambda name, n, d, **k: features(fs, name, n, d, **k)
    a, b = f("fd.a1", 600, 32), f("fd.a2", 500, 32, scale=0.5, offset=0.1)
    c = {}
    c["plain_d32"] = (a, b)
    c["plain_d64"] = (f("fd.b1", 400, 64), f("fd.b2", 400, 64, scale=0.45))
    c["signed_d64"] = (f("fd.c1", 400, 64, relu=False), f("fd.c2", 300, 64, relu=False, offset=0.3))
    c["large_mean_d32"] = (f("fd.d1", 500, 32, offset=100.0, relu=False), f("fd.d2", 500, 32, offset=100.5, relu=False))
    c["decay_d64"] = (
        f("fd.e1", 400, 64, decay=0.25, relu=False),
        f("fd.e2", 400, 64, decay=0.25, relu=False, scale=0.5),
    )
    c["rank16_d64"] = (f("fd.f1", 400, 64, rank=16, relu=False), f("fd.f2", 400, 64, rank=16, relu=False))
    c["n_lt_d"] = (f("fd.g1", 40, 64), f("fd.g2", 48, 64))
    same = f("fd.h", 300, 64)
    c["identical"] = (same, same.copy())
    few = f("fd.i", 40, 64)
    c["identical_n_lt_d"] = (few, few.copy())
    dead1, dead2 = f("fd.j1", 300, 63).copy(), f("fd.j2", 320, 63).copy()  # 63 = 3*3*7, as in sFID
    dead1[:, ::7] = 0.0
    dead2[:, ::7] = 0.0
    c["dead_columns_d63"] = (dead1, dead2)
    const1, const2 = np.full((20, 8), 0.5, np.float32), np.full((20, 8), 0.75, np.float32)
    c["constant_d8"] = (const1, const2)
    return c


def pr_cases(fs, sizes):
    n1, n2 = sizes
    f = lambda name, n, d, **k: features(fs, name, n, d, **k)
    c = {}
    c["d32"] = (f("pr.a1", n1, 32, rank=8, mix="pr.a"), f("pr.a2", n2, 32, rank=8, mix="pr.a", scale=0.35, offset=0.02))
    c["d64"] = (f("pr.b1", n1, 64, rank=6, mix="pr.b"), f("pr.b2", n2, 64, rank=6, mix="pr.b", scale=0.5))
    # d=2048, low intrinsic dimension, norm^2 of some hundred: the regime of real pool_3 features,
    # where float16 distances visibly move both numbers
    base = f("pr.c0", 1, 2048, scale=0.5, offset=0.35)[0]
    z1 = f("pr.c1", n1, 2048, rank=16, mix="pr.c", scale=0.25, relu=False)
    z2 = f("pr.c2", n2, 2048, rank=16, mix="pr.c", scale=0.22, relu=False)
    c["d2048_pool_like"] = (
        np.maximum(base + z1, 0).astype(np.float32),
        np.maximum(base + z2 + np.float32(0.01), 0).astype(np.float32),
    )
    s = f("pr.d", 300, 32, rank=8)
    c["identical"] = (s, s.copy())
    c["disjoint"] = (f("pr.e1", 200, 32), f("pr.e2", 200, 32, offset=20.0))
    dup = f("pr.f1", 60, 32, rank=8)
    c["duplicates"] = (np.repeat(dup, 5, axis=0), np.repeat(dup[:40], 6, axis=0))
    # squared norms above 65504: the float16 block is not finite, the evaluator falls back to float32
    c["fp16_overflow"] = (
        f("pr.g1", 150, 256, scale=30.0, rank=6, mix="pr.g"),
        f("pr.g2", 150, 256, scale=27.0, rank=6, mix="pr.g"),
    )
    c["tiny"] = (f("pr.h1", 4, 32, rank=8, mix="pr.h"), f("pr.h2", 5, 32, rank=8, mix="pr.h"))
    return c


def is_features(fs, n):
    """Pool_3-like features with a class structure: 20 'classes', 2048-d, non-negative."""
    center = features(fs, "is.centre", 20, 2048, scale=0.5, offset=0.3)
    x = center[np.arange(n) % 20] + features(fs, "is.noise", n, 2048, rank=32, scale=0.15, relu=False)
    return np.maximum(x, 0).astype(np.float32)


def sha256(a: np.ndarray) -> str:
    a = np.ascontiguousarray(a)
    h = hashlib.sha256()
    h.update(f"{a.dtype.str}{a.shape}".encode())
    h.update(a.tobytes())
    return h.hexdigest()
