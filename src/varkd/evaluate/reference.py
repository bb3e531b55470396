"""What samples are compared with under ADM's protocol: statistics of real images, and some of their features.

From an .npz of OpenAI's layout (mu, sigma, mu_s, sigma_s of the whole data set; arr_0, the images of precision and
recall), from images in a folder or an .npz without statistics, or from what `save_reference` wrote, which needs no
network and says what it was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varkd.errors import VarkdError
from varkd.evaluate.extraction import extract
from varkd.evaluate.image_files import npz_keys, open_image_files, stored_statistics
from varkd.evaluate.inception import POOL_DIM, SPATIAL_DIM, Inception
from varkd.evaluate.moments import Gaussian, gaussian_of
from varkd.files import atomic_folder, read_json, sha256_of, write_json
from varkd.folders import Own, json_with
from varkd.world import World

_KIND = "varkd-adm-reference"
SAVED = Own("a saved reference", ("config.json",), json_with(kind=(_KIND,)), ("reference.safetensors",))
_PAIRS = {"pool": ("mu", "sigma", POOL_DIM), "spatial": ("mu_s", "sigma_s", SPATIAL_DIM)}


@dataclass(frozen=True)
class Reference:
    """Gaussians of the pool and spatial features (None: the source has no such statistics) and features (M, 2048).

    `hash` names the source file or images, `statistics` says where the Gaussians come from, `network` is the hash of
    the weights that saw the images (None: stored statistics, no images).
    """

    name: str
    hash: str
    statistics: str
    network: str | None
    pool: Gaussian
    spatial: Gaussian | None
    features_MF: Tensor | None

    def describe(self) -> dict[str, Any]:
        """The reference's part of a protocol."""
        num = None if self.features_MF is None else len(self.features_MF)
        return {
            "name": Path(self.name).name,
            "hash": self.hash,
            "statistics": self.statistics,
            "statistics_images": self.pool.num,
            "precision_recall_images": num,
        }


def open_reference(
    source: str | Path | Reference,
    net: Inception,
    *,
    batch_size: int | None = None,
    world: World | None = None,
    quiet: bool = False,
) -> Reference:
    """A reference from any source (see the module); images are seen by `net`, under several ranks shared out.

    Raises:
        VarkdError: nothing there, a damaged file, half of a pair of statistics, statistics of another network, no
            image or statistics at all, or a saved reference of other weights.
    """
    if isinstance(source, Reference):
        reference = source
    elif (Path(source) / "config.json").is_file():
        reference = load_reference(Path(source))
    else:
        return _from_images(source, net, batch_size, world, quiet)
    if reference.network not in (None, net.hash):
        raise VarkdError(
            f"the reference {reference.name} was seen by other Inception weights "
            f"({str(reference.network)[:12]}, not {net.hash[:12]}): build it again"
        )
    return reference


def _from_images(
    source: str | Path, net: Inception, batch_size: int | None, world: World | None, quiet: bool
) -> Reference:
    path = Path(source)
    keys = npz_keys(path) if path.is_file() and path.suffix == ".npz" else set()
    if "mu" in keys and "arr_0" not in keys:
        found = _stored(path)
        digest = sha256_of(path.read_bytes())
        return Reference(str(path), digest, "stored", None, found["pool"], found.get("spatial"), None)
    images = open_image_files(path)
    stored = _stored(path) if "mu" in keys else {}
    features = extract(images, net, batch_size=batch_size, world=world, quiet=quiet, label="reference")
    pool, spatial = stored.get("pool"), stored.get("spatial")
    if pool is None:
        pool, spatial = gaussian_of(features.pool_NF), gaussian_of(features.spatial_NF)
    return Reference(
        images.name,
        images.hash(),
        "stored" if stored else "computed from the images",
        net.hash,
        pool,
        spatial,
        features.pool_NF,
    )


def _stored(path: Path) -> dict[str, Gaussian]:
    arrays, found = stored_statistics(path), {}
    for name, (mean, covariance, width) in _PAIRS.items():
        present = [key in arrays for key in (mean, covariance)]
        if not any(present):
            continue
        if not all(present):
            raise VarkdError(f"{path} has only one of the keys {mean} and {covariance}: get the whole file")
        gaussian = Gaussian(torch.from_numpy(arrays[mean]), torch.from_numpy(arrays[covariance]))
        if len(gaussian.mean_F) != width:
            raise VarkdError(
                f"{path}: {mean} has {len(gaussian.mean_F)} features, the 2015 Inception network {width}: "
                f"these are statistics of another network"
            )
        if not (gaussian.mean_F.isfinite().all() and gaussian.covariance_FF.isfinite().all()):
            raise VarkdError(f"{path}: {mean} or {covariance} is not finite: download it again")
        found[name] = gaussian
    return found


def save_reference(reference: Reference, folder: Path) -> None:
    """Write `config.json` and `reference.safetensors` as one folder, atomically."""
    tensors = {"mu": reference.pool.mean_F, "sigma": reference.pool.covariance_FF}
    if reference.spatial is not None:
        tensors |= {"mu_s": reference.spatial.mean_F, "sigma_s": reference.spatial.covariance_FF}
    if reference.features_MF is not None:
        tensors["features"] = reference.features_MF
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    names = ("name", "hash", "statistics", "network")
    with atomic_folder(folder, SAVED) as temporary:
        save_file(tensors, temporary / "reference.safetensors")
        own = {name: getattr(reference, name) for name in names}
        write_json(
            temporary / "config.json",
            {"kind": _KIND, **own, "num": reference.pool.num, "tensors": _tensor_hash(tensors)},
        )


def load_reference(folder: Path) -> Reference:
    """What `save_reference` wrote.

    Raises:
        VarkdError: a file is missing or damaged, or the folder holds something else.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("kind") != _KIND:
        raise VarkdError(f"{folder} is no saved reference: give what --save-reference wrote")
    try:
        tensors = load_file(folder / "reference.safetensors")
        if config["tensors"] != _tensor_hash(tensors):
            raise ValueError("its hash does not fit")
        pool = Gaussian(tensors["mu"], tensors["sigma"], config["num"])
        spatial = Gaussian(tensors["mu_s"], tensors["sigma_s"], config["num"]) if "mu_s" in tensors else None
        return Reference(
            config["name"],
            config["hash"],
            config["statistics"],
            config["network"],
            pool,
            spatial,
            tensors.get("features"),
        )
    except (KeyError, ValueError, FileNotFoundError, SafetensorError) as error:
        raise VarkdError(f"the reference in {folder} is damaged: build it again") from error


def _tensor_hash(tensors: dict[str, Tensor]) -> str:
    return sha256_of(*(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)))
