"""Many images to disk: parts that ranks share out and a restart finds again, then one file or a folder of PNGs.

Image i depends on (seed, i, label, model, sampler) only, and parts are of fixed size, so any number of ranks, and a
run that was killed and started again, write the same bytes. Unfinished work lies in `.NAME.partial` beside the target.
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from varkd import pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import weights_hash
from varkd.data.shards import save_array
from varkd.errors import VarkdError
from varkd.evaluate.inception_score import CHUNK
from varkd.files import atomic_folder, read_json, remove_folder, sha256_of, write_json
from varkd.folders import Own, json_with
from varkd.progress import bar
from varkd.rollout import Sampler
from varkd.sampling import generate_with_codes
from varkd.tokenizers.protocol import Tokenizer
from varkd.world import Rng, World

Layout = Literal["npz", "png"]
SAMPLES = Own("samples", ("samples.json",), json_with("num", "seed", "sampler"),
              ("samples.npz", "grid.png", "images", "labels.npy"))  # fmt: skip
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Drawing:
    """What is drawn: one image per label, and the order in which the images stand in the file.

    `order` is "given" (that of the labels) or "shuffled" (by the seed), which files of more than one chunk of the
    Inception Score need unless their labels are mixed already.
    """

    model: Backbone
    tokenizer: Tokenizer
    label_N: Tensor
    sampler: Sampler
    seed: int
    batch_size: int = 250
    resize: int | None = None
    order: Literal["given", "shuffled"] = "given"

    def __post_init__(self) -> None:
        if len(self.label_N) < 1 or self.batch_size < 1:
            raise VarkdError(
                f"num={len(self.label_N)}, batch_size={self.batch_size}: ask for at least one sample at a time"
            )

    @property
    def num(self) -> int:
        return len(self.label_N)

    @property
    def num_parts(self) -> int:
        return -(-self.num // self.batch_size)

    @cached_property
    def row_of_N(self) -> NDArray[np.int64]:
        """Which drawn image stands at each place of the file: int64 (N,)."""
        if self.order == "given":
            return np.arange(self.num)
        return torch.randperm(self.num, generator=Rng(self.seed).generator("file order")).numpy()

    def request(self, layout: Layout) -> dict[str, Any]:
        """What decides the bytes; a part of another request is not taken up."""
        return {
            "weights": weights_hash(self.model),
            "tokenizer": self.tokenizer.hash,
            "num": self.num,
            "seed": self.seed,
            "labels_hash": sha256_of(self.label_N.numpy().tobytes()),
            "sampler": vars(self.sampler),
            "resize": self.resize,
            "batch_size": self.batch_size,
            "order": self.order,
            "layout": layout,
        }


def file_order(num: int) -> Literal["given", "shuffled"]:
    """Shuffled where the file has more than one chunk of the Inception Score."""
    return "shuffled" if num > CHUNK else "given"


def draw_to(
    drawing: Drawing,
    out: Path,
    layout: Layout = "npz",
    *,
    about: dict[str, Any] | None = None,
    world: World | None = None,
    quiet: bool = False,
) -> Path:
    """Draw the images and write the folder `out` at once when all are there; the same call resumes.

    `samples.npz` (arr_0 uint8 NHWC, label, codes) or `images/000000.png` with `labels.npy`; `grid.png`, and
    `samples.json` with the request and `about`.

    Raises:
        VarkdError: unfinished work of another request lies there, or the disk is full.
    """
    world = world or World()
    partial, request = _partial(out), drawing.request(layout)
    if world.is_main:
        _open(partial, request)
    world.barrier()
    if not (partial / "request.json").is_file():
        raise VarkdError(f"the ranks see no common folder {partial.parent}: write to a shared one")
    place_of_N = np.argsort(drawing.row_of_N)
    mine = [part for part in range(drawing.num_parts) if part % world.size == world.rank]
    sizes = [min(drawing.batch_size, drawing.num - part * drawing.batch_size) for part in mine]
    with bar("sample", sum(sizes), quiet or not world.is_main) as running:
        for done, part in enumerate(mine, 1):
            if not _codes(partial, part).is_file():
                _draw_part(drawing, partial, part, layout, place_of_N)
            running.update(sum(sizes[:done]))
    world.barrier()
    if world.is_main:
        _finish(drawing, partial, out, layout, {**(about or {}), **request})
    world.barrier()
    return out


def _partial(out: Path) -> Path:
    """Beside the target, under a name that fits where the target's does."""
    name = out.name if len(out.name) < 200 else sha256_of(out.name.encode())[:16]
    return out.with_name(f".{name}.partial")


def _open(partial: Path, request: dict[str, Any]) -> None:
    if (partial / "request.json").is_file():
        found = read_json(partial / "request.json")
        if different := [name for name in request if found.get(name) != request[name]]:
            raise VarkdError(
                f"{partial} holds unfinished samples of other settings ({', '.join(different)}): finish "
                f"those with the same command, or choose another --out"
            )
        return
    write_json(partial / "request.json", request)


def _images(partial: Path, part: int) -> Path:
    return partial / f"part-{part:06d}-images.npy"


def _codes(partial: Path, part: int) -> Path:
    """Written last: a part with codes is whole."""
    return partial / f"part-{part:06d}-codes.npy"


def _draw_part(drawing: Drawing, partial: Path, part: int, layout: Layout, place_of_N: NDArray[np.int64]) -> None:
    first = part * drawing.batch_size
    label_B = drawing.label_N[first : first + drawing.batch_size]
    images, codes_BL = generate_with_codes(
        drawing.model,
        drawing.tokenizer,
        label_B,
        drawing.sampler,
        drawing.seed,
        drawing.batch_size,
        quiet=True,
        first_row=first,
        resize=drawing.resize,
    )
    images_BHWC = images.permute(0, 2, 3, 1).contiguous().numpy()
    if layout == "png":
        for row, image_HWC in enumerate(images_BHWC):
            drawn = Image.fromarray(image_HWC.squeeze(2) if image_HWC.shape[2] == 1 else image_HWC)
            pictures.save_image(partial / "images" / f"{place_of_N[first + row]:06d}.png", drawn)
    save_array(_images(partial, part), images_BHWC if layout == "npz" else images_BHWC[:100])
    save_array(_codes(partial, part), codes_BL.numpy().astype(np.uint16))


def _link(source: Path, target: Path) -> None:
    """A second name where the file system has such, so that a kill here loses nothing; else a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _finish(drawing: Drawing, partial: Path, out: Path, layout: Layout, about: dict[str, Any]) -> None:
    parts = [np.load(_images(partial, part), mmap_mode="r") for part in range(drawing.num_parts)]
    codes_NL = np.concatenate([np.load(_codes(partial, part)) for part in range(drawing.num_parts)])
    label_N = drawing.label_N.numpy()
    columns = min(drawing.model.num_classes, 10) if drawing.model.num_classes > 1 else 10
    shown = [np.asarray(part[: columns * 10]) for part in parts[: -(-columns * 10 // drawing.batch_size)]]
    with atomic_folder(out, SAMPLES) as temporary:
        if layout == "npz":
            _write_npz(temporary / "samples.npz", parts, drawing, label_N, codes_NL)
        else:
            (temporary / "images").mkdir()
            for file in (partial / "images").glob("*.png"):
                _link(file, temporary / "images" / file.name)
            save_array(temporary / "labels.npy", label_N[drawing.row_of_N])
        pictures.save_png(temporary / "grid.png", pictures.grid(np.concatenate(shown)[: columns * 10], columns))
        write_json(temporary / "samples.json", about)
    remove_folder(partial)


def _write_npz(
    path: Path,
    parts: list[NDArray[np.uint8]],
    drawing: Drawing,
    label_N: NDArray[np.int64],
    codes_NL: NDArray[np.uint16],
) -> None:
    """An .npz as `np.savez` writes it, image by image and without the time of day."""
    order = drawing.row_of_N
    shape = (drawing.num, *parts[0].shape[1:])
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", _ZIP_DATE), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for row in order.tolist():
                member.write(parts[row // drawing.batch_size][row % drawing.batch_size].tobytes())
        for name, rows in (("label", label_N), ("codes", codes_NL)):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_DATE), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(rows[order]), allow_pickle=False)
