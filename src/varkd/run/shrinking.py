"""`varkd shrink`: a student cut out of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from varkd.backbones.protocol import MODEL, Backbone
from varkd.backbones.shrink import Importance, Sizes, count, measure, sizes_for, sizes_of
from varkd.backbones.shrink import shrink as cut
from varkd.backbones.store import weights_hash
from varkd.data.codes import CodeDataset
from varkd.data.loader import ordered_batches
from varkd.errors import VarkdError
from varkd.evaluate.agreement import cross_entropy
from varkd.files import atomic_folder, write_json
from varkd.folders import Own
from varkd.progress import track
from varkd.rollout import evaluating
from varkd.run.data import Codes, pick_device
from varkd.run.models import open_model
from varkd.run.official import check_new

RECORD = "shrink.json"
_SHRUNK = Own("a shrunk model", MODEL.markers, MODEL.knows, (*MODEL.names, RECORD))
_BATCH, _VALIDATION_CODES = 16, 256


def shrink(
    model: Backbone,
    codes: CodeDataset,
    *,
    params: float | None = None,
    layers: int | None = None,
    dim: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    num: int = 256,
) -> Backbone:
    """`varkd.shrink`: a smaller model made of the parts of `model` that matter most on `num` sequences of `codes`.

    Sizes that are not given stay; `dim` and `heads` give each other. `params` is a share of the parameters instead, for
    which depth, width and FFN shrink alike. See `varkd.backbones.shrink` for how parts are scored.

    Returns:
        A model on the CPU in the dtype of `model`, in evaluation mode: save it, or train it.

    Raises:
        VarkdError: no size is given, sizes that are no smaller model, or codes of another tokenizer.
    """
    sizes = _sizes(model, params, layers, dim, heads, ffn)
    if model.tokenizer_hash not in (None, codes.tokenizer_hash):
        raise VarkdError(
            f"this model speaks the codes of tokenizer {str(model.tokenizer_hash)[:12]}, the data are of "
            f"{codes.tokenizer_hash[:12]}: give codes of the model's tokenizer"
        )
    return cut(model, sizes, _importance(model, codes, num, quiet=True))


def shrink_run(
    teacher: Path,
    data: Path,
    out: Path,
    *,
    params: float | None = None,
    layers: int | None = None,
    dim: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    num: int = 256,
    device: str = "auto",
    quiet: bool = False,
) -> list[str]:
    """Write the shrunk model as a model folder, with a record of what was kept; returns lines for a person.

    Raises:
        VarkdError: as `shrink`; also a teacher that does not fit the data, or an `out` that holds something.
    """
    check_new(out)
    codes = Codes(data)
    model = open_model(teacher, codes, device=str(pick_device(device)))
    sizes = _sizes(model, params, layers, dim, heads, ffn)
    importance = _importance(model, codes.split("train"), num, quiet)
    small = cut(model, sizes, importance)
    validation, where = codes.split("validation"), model.device
    before, after = (
        cross_entropy(each.to(where), ordered_batches(validation, 64, most=_VALIDATION_CODES), where)
        for each in (model, small)
    )
    small = small.to("cpu")
    with atomic_folder(out, _SHRUNK) as folder:
        write_json(folder / "config.json", small.describe())
        save_file(
            {name: value.contiguous() for name, value in small.state_dict().items()}, folder / "model.safetensors"
        )
        write_json(
            folder / RECORD,
            {
                "teacher": str(teacher),
                "teacher_hash": weights_hash(model),
                "sequences": num,
                "validation_ce": [before, after],
                **_record(importance),
            },
        )
    whole = Sizes.of(model)
    lines = [f"{name.replace('_', ' ')}: {vars(whole)[name]} -> {size}" for name, size in vars(sizes).items()]
    nums = [count(each) for each in (model, small)]
    return [
        *lines,
        f"parameters: {nums[0]:,} -> {nums[1]:,} ({nums[1] / nums[0]:.1%})",
        f"validation cross-entropy: {before:.3f} -> {after:.3f}, before any training",
    ]


def _sizes(
    model: Backbone, params: float | None, layers: int | None, dim: int | None, heads: int | None, ffn: int | None
) -> Sizes:
    given = [size for size in (layers, dim, heads, ffn) if size is not None]
    if (params is None) != bool(given):
        raise VarkdError("give either a share of the parameters (params) or sizes (layers, dim, heads, ffn)")
    return sizes_of(model, layers, dim, heads, ffn) if params is None else sizes_for(model, params)


def _importance(model: Backbone, codes: CodeDataset, num: int, quiet: bool) -> Importance:
    if num < 1:
        raise VarkdError(f"num {num}: importance is measured on at least one sequence")
    batches = list(range(-(-min(num, len(codes)) // _BATCH)))
    data = ordered_batches(codes, _BATCH, most=min(num, len(codes)))
    with evaluating(model), torch.no_grad():
        return measure(model, track(data, "importance", len(batches), quiet))


def _record(importance: Importance) -> dict[str, Any]:
    """The scores, for who wants to know why."""
    return {
        "blocks": importance.blocks,
        "channels": importance.channel_D.tolist(),
        "heads": {name: score_H.tolist() for name, score_H in importance.heads.items()},
    }
