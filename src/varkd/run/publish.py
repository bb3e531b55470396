"""`varkd publish`: a run, or a model folder and its tokenizer -> a folder for the Hugging Face hub and diffusers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from varkd import hub, pictures
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import load_backbone
from varkd.config import RunConfig, read_run
from varkd.distill.describe import explain
from varkd.errors import VarkdError, check_seed
from varkd.files import read_json
from varkd.folders import expand, locate
from varkd.methods import METHODS
from varkd.publishing.card import shown_labels
from varkd.publishing.facts import Publication, Teacher, Training, without_folders
from varkd.publishing.folder import PUBLISHED, write_folder
from varkd.publishing.metadata import check_base_model, check_license
from varkd.report.runs import RunFolder
from varkd.report.runs import read_run as read_run_folder
from varkd.rollout import Sampler
from varkd.run.data import Codes, pick_device
from varkd.run.models import load_trained, recorded_model, trained_method
from varkd.sampling import generate_with_codes
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import load_tokenizer

_HUB = "hub:"
_COLUMNS = 10


def publish(
    source: str | Path,
    to: str | Path,
    *,
    tokenizer: str | Path | None = None,
    sampler: Sampler | None = None,
    license: str | None = None,
    base_model: str | None = None,
    name: str | None = None,
    rows: int = 4,
    seed: int = 0,
    private: bool | None = None,
    token: hub.Token = None,
    device: str = "auto",
    quiet: bool = False,
) -> str:
    """Write a run's selected model, or a model folder, as a folder that others can use without varkd.

    Model, tokenizer, `README.md` (the model card), `samples.png`, and the files of code that
    `diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads. docs/publish.md shows the way.

    Args:
        to: a folder, or "hub:OWNER/NAME" for a repository of the Hugging Face hub.
        tokenizer: of a model folder; a run knows its own.
        sampler: how images are drawn unless a call says otherwise; by default as in the run's evaluation, but one step
            after the other (`parallel` is off).
        license: an identifier of the hub (apache-2.0), or a name; None says that nobody stated one.
        base_model: the hub repository that the weights derive from, for the card's metadata.
        rows: of the sample grid; its first row is what the code in the card draws.
        private, token: for a repository of the hub.

    Returns:
        The folder, or the address of the commit.

    Raises:
        VarkdError: nothing there to publish, numbers of other weights than these, `to` holds something else, or the
            hub refuses.
    """
    source, repo_id = Path(expand(str(source))), _repository(to)
    check_license(license)
    check_base_model(base_model)
    check_seed("seed", seed)
    if sampler is not None and sampler.parallel != "off":
        raise VarkdError(
            f"parallel={sampler.parallel} cannot be published: the pipeline decodes one step after the "
            "other; leave it out"
        )
    if rows < 1:
        raise VarkdError(f"--rows {rows}: the sample grid needs at least one row")
    if repo_id is None:
        PUBLISHED.check_replaceable(Path(expand(str(to))), "--to")
    origin = _open(source, tokenizer, device)
    default = repo_id.split("/")[1] if repo_id else None
    publication = Publication(
        name or default or origin.name,
        origin.model,
        origin.tokenizer,
        replace(sampler or origin.sampler, parallel="off"),
        seed,
        min(origin.model.num_classes, _COLUMNS),
        origin.training,
        origin.measured,
        license,
        base_model,
        repo_id,
    )
    grid = _draw(publication, rows, quiet)
    publication.model.cpu()
    publication.tokenizer.cpu()
    if repo_id is None:
        write_folder(publication, grid, Path(expand(str(to))))
        return str(to)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / publication.name
        write_folder(publication, grid, folder)
        return hub.push(folder, repo_id, private=private, token=token, commit_message=f"Publish {publication.name}")


def default_sampler(source: Path) -> Sampler:
    """How images of a run or a model folder are drawn unless somebody says otherwise."""
    if not (source / "run.yaml").is_file():
        return Sampler()
    return _sampler(read_run(source), read_run_folder(source))


@dataclass(frozen=True)
class _Origin:
    """What stands in the folder that is published."""

    name: str
    model: Backbone
    tokenizer: Tokenizer
    sampler: Sampler
    training: Training | None = None
    measured: RunFolder | None = None


def _repository(to: str | Path) -> str | None:
    """OWNER/NAME of "hub:OWNER/NAME", None of a folder; without the hub's client nothing is begun."""
    if not str(to).startswith(_HUB):
        return None
    repo_id = str(to).removeprefix(_HUB)
    hub.check_repo(repo_id)
    hub.client()
    return repo_id


def _open(source: Path, tokenizer: str | Path | None, device: str) -> _Origin:
    if (source / "run.yaml").is_file():
        if tokenizer is not None:
            raise VarkdError(f"{source} is a run, which knows its tokenizer: leave --tokenizer out")
        return _open_run(source, device)
    model, _ = load_backbone(source, str(pick_device(device)))
    if tokenizer is None:
        raise VarkdError(f"{source} is a model folder, not a run: give its tokenizer with --tokenizer DIR")
    loaded = load_tokenizer(expand(str(tokenizer)))
    _check_pair(model, loaded)
    return _Origin(source.resolve().name, model, loaded, Sampler())


def _open_run(source: Path, device: str) -> _Origin:
    run, codes, model = load_trained(source, device)
    measured = read_run_folder(source)
    _check_measured(source, measured)
    sampler = _sampler(run, measured)
    return _Origin(
        run.name or source.resolve().name, model, codes.tokenizer, sampler, _training(source, run, codes), measured
    )


def _check_pair(model: Backbone, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer of other codes; where the model does not name its own, by what sizes tell."""
    if model.tokenizer_hash not in (None, tokenizer.hash):
        raise VarkdError(
            f"this model speaks the codes of tokenizer {str(model.tokenizer_hash)[:12]}, not of "
            f"{tokenizer.hash[:12]}: give the tokenizer that it was trained with"
        )
    ours, theirs = ((each.vocab_size, each.sequence_length) for each in (model, tokenizer))
    if ours != theirs:
        raise VarkdError(
            f"the model has {ours[0]} codes, {ours[1]} an image, the tokenizer {theirs[0]} and "
            f"{theirs[1]}: give the tokenizer that it was trained with"
        )


def _check_measured(source: Path, measured: RunFolder) -> None:
    """Refuse numbers of other weights than those that would be published."""
    if measured.metrics is None:
        return
    selected, protocol = read_json(source / "checkpoints" / "selected.json"), measured.metrics.get("protocol") or {}
    for key in ("checkpoint", "weights"):
        if protocol.get(key) != selected[key]:
            raise VarkdError(
                f"{source / 'metrics.json'} was measured on {protocol.get(key)}, the run's model is now "
                f"{selected[key]}: run `varkd evaluate {source}` again"
            )


def _sampler(run: RunConfig, measured: RunFolder) -> Sampler:
    """The one that the numbers were measured with, where there are any."""
    told = ((measured.metrics or {}).get("protocol") or {}).get("sampler")
    return Sampler(**told) if told else run.evaluation.sampler


def _training(source: Path, run: RunConfig, codes: Codes) -> Training:
    preset = METHODS[run.preset]
    recorded, manifest = read_json(source / "environment.json"), codes.manifest
    seen = Codes(locate(recorded["codes"], source, run.data))  # `codes` are those of real images
    sampled = seen.manifest.get("samples")
    return Training(
        run.preset,
        preset.source,
        preset.summary,
        preset.method != run.method,
        explain(trained_method(run.method, seen)),
        read_json(source / "status.json")["step"],
        run.train.batch_size,
        without_folders(manifest["source"]["name"]),
        manifest["splits"]["train"]["num"],
        Path(run.init).name if run.init else None,
        _teacher(source, run, recorded) or (_sampled_by(seen, sampled["teacher"]) if sampled else None),
        seen.manifest["splits"]["train"]["num"] if sampled else None,
    )


def _teacher(source: Path, run: RunConfig, recorded: dict[str, Any]) -> Teacher | None:
    path = recorded_model(source, "teacher", run.teacher)
    if path is None or not run.method.needs_teacher:
        return None
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    return Teacher(path.name, recorded.get("teacher_hash") or "not recorded", config)


def _sampled_by(codes: Codes, recorded: dict[str, Any]) -> Teacher:
    """The model whose samples were the training data."""
    path = locate(recorded["path"], codes.folder, recorded["given"])
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    return Teacher(path.name, recorded["hash"], config)


def _draw(publication: Publication, rows: int, quiet: bool) -> NDArray[np.uint8]:
    """The sample grid: one column a class, nothing left out."""
    label_B = torch.tensor(shown_labels(publication)).repeat(rows)
    images, _ = generate_with_codes(
        publication.model, publication.tokenizer, label_B, publication.sampler, publication.seed, quiet=quiet
    )
    return pictures.grid(images.permute(0, 2, 3, 1).numpy(), publication.columns)
