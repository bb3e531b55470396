"""`varkd quantize`: the model of a run -> a folder with smaller weights that every verb reads like the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save_file

from varkd.backbones.protocol import MODEL
from varkd.backbones.quantized import Bits, is_quantized, quantized_state
from varkd.backbones.store import load_backbone, weights_path
from varkd.config import dump, read_run
from varkd.errors import VarkdError
from varkd.files import atomic_folder, read_json, write_json, write_text
from varkd.folders import Own, locate, relative
from varkd.run.official import check_new

_QUANTIZED = Own("a quantized model", MODEL.markers, MODEL.knows,
                 ("model.safetensors", "run.yaml", "environment.json", "status.json", "checkpoints"))  # fmt: skip


def quantize_run(source: Path, out: Path, weights: Bits | Literal["bf16"]) -> str:
    """Write the selected weights of a run folder, or those of a model folder, with fewer bits.

    Linear layers, the head included, become int8 (a scale per row) or int4 (a scale per 32 weights) by torchao; the
    rest, and everything with "bf16", becomes bfloat16. The model computes in bfloat16. Of a run folder, the records
    that `varkd sample`, `evaluate` and `report` read come along.

    Returns:
        A line for a person: how much was quantized, and the size of the weights before and after.

    Raises:
        VarkdError: no model there, one that is quantized already, or `out` holds something.
    """
    check_new(out)
    model, _ = load_backbone(source)
    before = weights_path(source)
    with safe_open(before, "pt") as file:
        if any(":" in name for name in file.keys()):  # noqa: SIM118 - it is no dict
            raise VarkdError(f"{source} is quantized already: quantize the model that it was made from")
    layers = [layer for layer in model.modules() if weights != "bf16" and is_quantized(layer, weights)]
    with atomic_folder(out, _QUANTIZED) as folder:
        write_json(folder / "config.json", model.describe())
        save_file(quantized_state(model, weights), folder / "model.safetensors")
        if (source / "run.yaml").is_file():
            _copy_records(source, folder, out, weights)
    total = sum(parameter.numel() for parameter in model.parameters())
    small = sum(layer.weight.numel() for layer in layers)
    mib = [path.stat().st_size / 2**20 for path in (before, out / "model.safetensors")]
    what = (
        f"{len(layers)} layers with {small / total:.0%} of the parameters as {weights}, the rest" if layers else "all"
    )
    return f"{what} as bf16: {mib[0]:.2f} -> {mib[1]:.2f} MiB"


def _copy_records(source: Path, folder: Path, out: Path, weights: str) -> None:
    """What the verbs that look at a run read of it; `folder` will stand at `out`."""
    run, recorded = read_run(source), read_json(source / "environment.json")
    given = {"codes": run.data, "teacher": run.teacher, "init": run.init}
    moved = {
        name: relative(locate(recorded[name], source, path), out) for name, path in given.items() if recorded.get(name)
    }
    write_text(folder / "run.yaml", dump(replace(run, name=f"{run.name or source.name} {weights}", out=str(out))))
    write_json(folder / "environment.json", {**recorded, **moved})
    write_json(folder / "status.json", read_json(source / "status.json"))
    selected = read_json(source / "checkpoints" / "selected.json")
    write_json(folder / "checkpoints" / "selected.json", {**selected, "weights": f"{selected['weights']}, {weights}"})
