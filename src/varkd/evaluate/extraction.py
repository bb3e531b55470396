"""The two feature sets of ADM's evaluator for a stream of images, on one device or shared out over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varkd.evaluate.image_files import ImageFiles
from varkd.evaluate.inception import POOL_DIM, SPATIAL_DIM, Inception
from varkd.progress import bar
from varkd.world import World

_CPU_BATCH, _GPU_BATCH = 16, 128


@dataclass(frozen=True)
class Features:
    """Of N images in file order: `pool_NF` (N, 2048) and `spatial_NF` (N, 2023), on the network's device."""

    pool_NF: Tensor
    spatial_NF: Tensor


def extract(
    images: ImageFiles,
    net: Inception,
    *,
    batch_size: int | None = None,
    world: World | None = None,
    quiet: bool = False,
    label: str = "features",
) -> Features:
    """Features of all images; every rank sees a slice of the file and gets all of them.

    Args:
        batch_size: images at a time; by default 16 on a CPU and 128 on a GPU. It moves the last digits only.

    Raises:
        VarkdError: the file is damaged, or its images are not of one size.
    """
    world = world or World()
    begin, end = (images.num * (world.rank + step) // world.size for step in (0, 1))
    size = batch_size or (_CPU_BATCH if net.device.type == "cpu" else _GPU_BATCH)
    pool_NF = torch.empty(end - begin, POOL_DIM, dtype=net.dtype, device=net.device)
    spatial_NF = torch.empty(end - begin, SPATIAL_DIM, dtype=net.dtype, device=net.device)
    done = 0
    with bar(label, end - begin, quiet or not world.is_main) as running:
        for batch_BCHW in images.batches(begin, end, size):
            taps = net(batch_BCHW)
            pool_NF[done : done + len(batch_BCHW)], spatial_NF[done : done + len(batch_BCHW)] = taps
            done += len(batch_BCHW)
            running.update(done)
    return Features(world.gather_varied(pool_NF), world.gather_varied(spatial_NF))
