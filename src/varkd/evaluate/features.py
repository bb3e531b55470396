"""The small feature network that varkd's sample metrics are measured in, and its fit.

A convolutional classifier of the data set itself (residual blocks with batch normalization, He et al. 2016), trained
once in minutes on a CPU. Its distances are comparable between runs that share its hash, and with nothing else: they are
*not* Inception FIDs. Data with a single class has no classifier; there the network learns to tell turns of the image
apart (Gidaris et al. 2018), and class accuracy and class entropy are null.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varkd.data.images import ImageSet
from varkd.errors import VarkdError
from varkd.files import atomic_folder, read_json, sha256_of, write_json
from varkd.folders import Own, json_with
from varkd.progress import bar
from varkd.tokenizers.protocol import to_unit
from varkd.world import Rng

Task = Literal["classes", "turns"]
NUM_TURNS = 4
_KIND = "varkd-features"
FEATURES = Own(
    "a feature network", ("config.json",), json_with("hash", kind=(_KIND,)), ("fit.json", "model.safetensors")
)


@dataclass(frozen=True)
class FeatureConfig:
    """What rebuilds a `FeatureNet`. `num_classes` counts logits: classes, or turns when `task` is "turns"."""

    image_shape: tuple[int, int, int]
    num_classes: int
    task: Task = "classes"
    width: int = 24
    feature_dim: int = 64

    def __post_init__(self) -> None:
        channels, height, width = self.image_shape
        if channels not in (1, 3) or min(height, width) < 8:
            raise VarkdError(
                f"features need images of 1 or 3 channels and at least 8x8 pixels, not {channels}x{height}x{width}"
            )
        if self.num_classes < 2 or self.width < 1 or self.feature_dim < 1 or self.task not in ("classes", "turns"):
            raise VarkdError(f"not a feature network: {self}")


@dataclass(frozen=True)
class FitFeatures:
    """How the network is fitted: for `updates`, but no more than `max_epochs` of a small data set.

    `flip` mirrors training images: right for photographs, wrong for digits and text.
    """

    updates: int = 800
    max_epochs: int = 40
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    flip: bool = False
    width: int = 24
    feature_dim: int = 64
    seed: int = 0

    def updates_for(self, num: int) -> int:
        """The updates on `num` training images."""
        return min(self.updates, self.max_epochs * (num // min(self.batch_size, num)))


class FeatureNet(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> features (B, feature_dim) -> logits (B, num_classes)."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        channels, *sides = config.image_shape
        # The stem brings any image to about 32 pixels, which bounds the cost, and still sees every pixel.
        stride = max(1, min(sides) // 32)
        widths = [config.width << stage for stage in range(4 if min(sides) >= 16 else 3)]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], stride + 2, stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(*map(_Stage, widths, widths[1:]))
        self.project = nn.Linear(widths[-1], config.feature_dim)
        # Without weights of its own it gives every feature unit variance on the data, so that the distances are in
        # standard deviations of the real images and no direction counts for more by its arbitrary scale.
        self.standardize = nn.BatchNorm1d(config.feature_dim, affine=False)
        self.head = nn.Linear(config.feature_dim, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer before its non-linearity, standardized per feature: (B, feature_dim)."""
        pooled = self.stages(self.stem(images)).mean(dim=(2, 3))
        return self.standardize(self.project(pooled))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features.relu())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def hash(self) -> str:
        """SHA-256 over config and weights: numbers of two networks must not be compared."""
        head = f"{_KIND} {sorted(asdict(self.config).items())}".encode()
        state = sorted(self.state_dict().items())
        return sha256_of(head, *(name.encode() + value.cpu().numpy().tobytes() for name, value in state))


class _Stage(nn.Module):
    """Halve the sides, change the width, then one residual convolution."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, 2, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()
        )
        self.mix = nn.Sequential(
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.down(hidden)
        return hidden + self.mix(hidden)


def fit_features(
    train: ImageSet,
    validation: ImageSet,
    fit: FitFeatures | None = None,
    *,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> tuple[FeatureNet, dict[str, Any]]:
    """Fit a network to the data set's classes (or, with a single class, to turns of its images).

    The record is JSON: `name`, `task`, `accuracy` on the validation images (null without classes), `task_accuracy`,
    `num_train`, `num_validation`, `updates`, `epochs`, `seconds`, `precision`, `fit` and `hash`. Everything random
    follows `fit.seed`; `precision` is bfloat16 where the device is fast at it, else float32.

    Raises:
        VarkdError: fewer than 2 images in a split, images that are too small, or splits that do not fit together.
    """
    fit = fit or FitFeatures()
    config = _config_for(train, validation, fit)
    begun, rng = time.monotonic(), Rng(fit.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.generator("features/init").initial_seed())
        net = FeatureNet(config)
    updates, precision = fit.updates_for(len(train)), _precision(torch.device(device))
    _optimize(net.to(device).train(), train, fit, rng, precision, quiet)
    net.eval()
    accuracy = _task_accuracy(net, validation, fit.batch_size)
    record = {
        "name": f"varkd features of {train.name}",
        "task": config.task,
        "accuracy": accuracy if config.task == "classes" else None,
        "task_accuracy": accuracy,
        "num_train": len(train),
        "num_validation": len(validation),
        "updates": updates,
        "epochs": updates * min(fit.batch_size, len(train)) / len(train),
        "seconds": time.monotonic() - begun,
        "precision": str(precision).removeprefix("torch."),
        "fit": asdict(fit),
        "hash": net.hash,
    }
    return net, record


def _config_for(train: ImageSet, validation: ImageSet, fit: FitFeatures) -> FeatureConfig:
    if min(len(train), len(validation)) < 2:
        raise VarkdError(f"features need 2 images in each split, not {len(train)} and {len(validation)}: add images")
    if (train.image_shape, train.class_names) != (validation.image_shape, validation.class_names):
        raise VarkdError(f"the splits of {train.name} differ in image shape or classes: open both from one source")
    if min(fit.updates, fit.max_epochs) < 1 or fit.batch_size < 2 or fit.learning_rate <= 0:
        raise VarkdError(
            "fitting features needs updates and max_epochs >= 1, batch_size >= 2 and a positive learning rate"
        )
    has_classes = len(set(train.labels.tolist())) > 1
    num_logits = len(train.class_names) if has_classes else NUM_TURNS
    task: Task = "classes" if has_classes else "turns"
    return FeatureConfig(train.image_shape, num_logits, task, fit.width, fit.feature_dim)


def _precision(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # below AVX-512 the convolutions have no bfloat16 kernels and would be many times slower
        fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if fast else torch.float32


def _optimize(
    net: FeatureNet, train: ImageSet, fit: FitFeatures, rng: Rng, precision: torch.dtype, quiet: bool
) -> None:
    """AdamW under a triangle of the learning rate, on the device of the network."""
    updates = fit.updates_for(len(train))
    optimizer = torch.optim.AdamW(net.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    warmup = max(1, updates // 7)
    triangle = lambda done: min((done + 1) / warmup, (updates - done) / (updates - warmup + 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle)
    generator = rng.generator("features/augment")
    order = _endless_batches(len(train), fit.batch_size, rng.generator("features/order"))
    labels = torch.from_numpy(train.labels)
    with bar("feature network", updates, quiet) as running:
        for done, index_B in enumerate(islice(order, updates), 1):
            images_BCHW = _augment(train.batch(index_B), fit.flip, generator)
            target_B = labels[index_B]
            if net.config.task == "turns":
                target_B = torch.randint(NUM_TURNS, (len(index_B),), generator=generator)
                images_BCHW = turned(images_BCHW, target_B)
            images = to_unit(images_BCHW.to(net.device)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(net.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), target_B.to(net.device))
            if not loss.isfinite():
                raise VarkdError("the feature network diverged: lower its learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            running.update(done)


def _endless_batches(num: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices in full batches, each epoch in an order of its own; what is left of an epoch is dropped."""
    size = min(batch_size, num)
    while True:
        yield from torch.randperm(num, generator=generator).split(size)[: num // size]


def _augment(images_BCHW: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, repeating the border, and mirror half of them if `flip`."""
    num, channels, height, width = images_BCHW.shape

    def shifted(side: int) -> Tensor:
        reach = side // 8
        offset_B = torch.randint(-reach, reach + 1, (num,), generator=generator)
        return (torch.arange(side) + offset_B[:, None]).clamp(0, side - 1)

    row_BH, column_BW = shifted(height), shifted(width)
    if flip:
        mirrored_B = torch.rand(num, generator=generator) < 0.5
        column_BW = torch.where(mirrored_B[:, None], width - 1 - column_BW, column_BW)
    image, channel = torch.arange(num)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images_BCHW[image, channel, row_BH[:, None, :, None], column_BW[:, None, None, :]]


def turned(images_BCHW: Tensor, turn_B: Tensor) -> Tensor:
    """Each image under one of four turns: quarter rotations of a square, the four reflections of a rectangle."""
    if images_BCHW.shape[2] == images_BCHW.shape[3]:
        turns = [images_BCHW.rot90(times, dims=(2, 3)) for times in range(NUM_TURNS)]
    else:
        turns = [images_BCHW.flip(dims) for dims in ((), (2,), (3,), (2, 3))]
    return torch.stack(turns)[turn_B, torch.arange(len(turn_B))]


def _task_accuracy(net: FeatureNet, validation: ImageSet, batch_size: int) -> float:
    hits = 0
    for index_B in torch.arange(len(validation)).split(batch_size):
        images_BCHW = validation.batch(index_B)
        if net.config.task == "classes":
            views = [(images_BCHW, torch.from_numpy(validation.labels)[index_B])]
        else:
            turns = [torch.full((len(index_B),), turn) for turn in range(NUM_TURNS)]
            views = [(turned(images_BCHW, turn_B), turn_B) for turn_B in turns]
        hits += sum(int((features_of(net, images)[1].argmax(1) == target).sum()) for images, target in views)
    return hits / len(validation) / (1 if net.config.task == "classes" else NUM_TURNS)


@torch.inference_mode()
def features_of(net: FeatureNet, images: ImageSet | Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Features (N, F) and logits (N, K) of uint8 images (N, C, H, W) or an image set, float64 on the CPU.

    The network runs in evaluation mode, in float32, on the device where it lies.

    Raises:
        VarkdError: there are no images, or they are not uint8 of the network's shape.
    """
    shape, dtype = (images.shape[1:], images.dtype) if isinstance(images, Tensor) else (images.image_shape, torch.uint8)
    if tuple(shape) != net.config.image_shape or dtype != torch.uint8:
        raise VarkdError(
            f"the feature network takes uint8 images of shape {net.config.image_shape}, not {tuple(shape)} {dtype}: "
            f"fit one to this data set"
        )
    if not len(images):
        raise VarkdError("there are no images to take features of")
    was_training = net.training
    net.eval()
    outputs = []
    for index_B in torch.arange(len(images)).split(batch_size):
        batch = images[index_B] if isinstance(images, Tensor) else images.batch(index_B)
        features = net.features(to_unit(batch.to(net.device)))
        outputs.append((features.double().cpu(), net.logits(features).double().cpu()))
    net.train(was_training)
    return torch.cat([features for features, _ in outputs]), torch.cat([logits for _, logits in outputs])


def save_features(net: FeatureNet, record: dict[str, Any], folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and `fit.json` (the record) as one folder, atomically."""
    with atomic_folder(folder, FEATURES) as temporary:
        write_json(temporary / "config.json", {"kind": _KIND, **asdict(net.config), "hash": net.hash})
        write_json(temporary / "fit.json", record)
        save_file(
            {name: value.cpu().contiguous() for name, value in net.state_dict().items()},
            temporary / "model.safetensors",
        )


def load_features(folder: Path) -> tuple[FeatureNet, dict[str, Any]]:
    """The network (evaluation mode, CPU) and record that `save_features` wrote.

    Raises:
        VarkdError: a file is missing or damaged, or the weights are not the ones that were saved.
    """
    config, record = read_json(folder / "config.json"), read_json(folder / "fit.json")
    again = "fit the feature network again"
    if not isinstance(config, dict) or config.pop("kind", None) != _KIND or not isinstance(record, dict):
        raise VarkdError(f"{folder} does not hold a feature network of varkd: {again}")
    expected = config.pop("hash", None)
    try:
        config["image_shape"] = tuple(config["image_shape"])
        net = FeatureNet(FeatureConfig(**config))
        net.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError:
        raise VarkdError(f"no such file: {folder / 'model.safetensors'}: {again}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise VarkdError(f"the feature network in {folder} is damaged ({reason}): {again}") from error
    if net.hash != expected:
        raise VarkdError(f"the weights in {folder} do not have the hash of its config.json: {again}")
    return net.eval(), record
