"""`varkd reproduce ROW`: the commands of one row of the VarKD paper's ImageNet table, and what they need.

The paper's numbers are those of arXiv 2606.06078, table 5 (FID, IS, precision, recall; 50,000 samples by LlamaGen's
protocol). Nothing here was run on ImageNet; docs/imagenet.md says what was tried.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from varkd.backbones import zoo
from varkd.errors import VarkdError, did_you_mean
from varkd.methods import METHODS
from varkd.progress import console

Numbers = tuple[float, float, float, float]
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
"""ADM's reference batch of ImageNet, which every paper compares with (docs/evaluation.md has its address)."""
KD_UPDATES, SECOND_UPDATES = 250_000, 20_000
_IMAGES, _VIEWS, _CHECKPOINTS = 1_281_167, 10, 3
_STAGES = {"kd": "KD", "seqkd_soft": "SeqKD", "gkd_prefix": "GKD", "varkd": "VarKD"}


@dataclass(frozen=True)
class Row:
    """One student and teacher of the table. `student` and `teacher` are names of `varkd zoo`."""

    recipe: str
    student: str
    teacher: str
    paper: Mapping[str, Numbers]

    @property
    def image_size(self) -> int:
        return zoo.entry(self.student).resolution


_B_FROM_L = {"none": (6.51, 156.3, 0.81, 0.46), "kd": (4.92, 195.6, 0.84, 0.45),
             "seqkd_soft": (5.08, 197.9, 0.84, 0.44),
             "gkd_prefix": (4.94, 194.7, 0.85, 0.44), "varkd": (4.58, 203.3, 0.85, 0.46)}  # fmt: skip
ROWS: dict[str, Row] = {
    "llamagen-b-from-l": Row("imagenet/llamagen-b", "LlamaGen-B-384", "LlamaGen-L-384", _B_FROM_L),
    "llamagen-b-from-l-256": Row("imagenet/llamagen-b", "LlamaGen-B-256", "LlamaGen-L-256", _B_FROM_L),
    "llamagen-b-from-xl": Row("imagenet/llamagen-b", "LlamaGen-B-384", "LlamaGen-XL-384", {
        "none": (6.51, 156.3, 0.81, 0.46), "kd": (5.35, 186.5, 0.82, 0.46), "seqkd_soft": (5.37, 212.8, 0.84, 0.42),
        "gkd_prefix": (5.02, 190.1, 0.82, 0.47), "varkd": (4.98, 198.0, 0.85, 0.46)}),
    "llamagen-b-from-xxl": Row("imagenet/llamagen-b", "LlamaGen-B-384", "LlamaGen-XXL-384", {
        "none": (6.51, 156.3, 0.81, 0.46), "kd": (5.72, 178.7, 0.83, 0.44), "seqkd_soft": (5.98, 191.0, 0.85, 0.43),
        "gkd_prefix": (5.32, 175.2, 0.81, 0.47), "varkd": (4.82, 198.2, 0.84, 0.48)}),
    "llamagen-l-from-xl": Row("imagenet/llamagen-l", "LlamaGen-L-384", "LlamaGen-XL-384", {
        "none": (3.07, 156.0, 0.83, 0.52), "kd": (3.02, 244.5, 0.82, 0.54), "seqkd_soft": (3.10, 258.1, 0.83, 0.52),
        "gkd_prefix": (2.93, 248.0, 0.82, 0.55), "varkd": (2.83, 242.7, 0.83, 0.55)}),
    "llamagen-l-from-xxl": Row("imagenet/llamagen-l", "LlamaGen-L-384", "LlamaGen-XXL-384", {
        "none": (3.07, 156.0, 0.83, 0.52), "kd": (3.01, 246.6, 0.83, 0.54), "seqkd_soft": (3.15, 238.6, 0.83, 0.52),
        "gkd_prefix": (2.88, 248.1, 0.82, 0.55), "varkd": (2.91, 246.7, 0.83, 0.54)}),
    "arpg-l-from-xl": Row("imagenet/arpg-l", "ARPG-L", "ARPG-XL", {
        "none": (2.30, 309.0, 0.80, 0.58), "kd": (2.20, 296.1, 0.80, 0.59), "seqkd_soft": (2.28, 305.2, 0.80, 0.59),
        "gkd_prefix": (2.26, 310.1, 0.81, 0.58), "varkd": (2.19, 313.0, 0.81, 0.57)}),
    "arpg-l-from-xxl": Row("imagenet/arpg-l", "ARPG-L", "ARPG-XXL", {
        "none": (2.30, 309.0, 0.80, 0.58), "kd": (2.21, 293.1, 0.80, 0.58), "seqkd_soft": (2.22, 310.2, 0.80, 0.58),
        "gkd_prefix": (2.19, 307.8, 0.81, 0.59), "varkd": (2.15, 301.3, 0.80, 0.59)}),
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where a reproduction reads and writes, and on how many GPUs of one machine it runs."""

    images: Path
    downloads: Path
    out: Path
    gpus: int = 8
    methods: tuple[str, ...] = ("varkd",)
    overrides: tuple[str, ...] = field(default=())


def row(name: str) -> Row:
    """Raises VarkdError where there is no such row."""
    if name not in ROWS:
        raise VarkdError(f"no row '{name}' of the paper's table: {did_you_mean(name, ROWS)}")
    return ROWS[name]


def commands(name: str, places: Places) -> list[list[str]]:
    """Every command of a row in order; `reproduce` leaves out what is made, and the others resume."""
    chosen = row(name)
    for method in places.methods:
        if method not in METHODS:
            raise VarkdError(f"unknown method '{method}': {did_you_mean(method, METHODS)} (`varkd methods` lists them)")
    student, teacher = zoo.entry(chosen.student), zoo.entry(chosen.teacher)
    tokenizer = next(known for known in zoo.TOKENIZERS if known.name == student.tokenizer)
    vq, models = places.out / f"tokenizer-{chosen.image_size}", places.out / "models"
    codes, kd = places.out / f"codes-{chosen.image_size}", places.out / name / "kd"
    spread = ["torchrun", "--nproc-per-node", str(places.gpus), "-m", "varkd"]
    train = [*spread, "train", chosen.recipe, f"data={codes}", f"teacher={models / teacher.name}"]
    made = [
        [
            "varkd",
            "tokenizer",
            "import",
            str(places.downloads / tokenizer.file),
            "--out",
            str(vq),
            "--image-size",
            str(chosen.image_size),
        ],
        *(
            [
                "varkd",
                "convert",
                str(places.downloads / known.file),
                "--out",
                str(models / known.name),
                "--model",
                known.name,
                "--tokenizer",
                str(vq),
            ]
            for known in (student, teacher)
        ),
        [
            *spread,
            "encode",
            str(places.images),
            "--tokenizer",
            str(vq),
            "--out",
            str(codes),
            "--image-size",
            str(chosen.image_size),
            *_views(student.family),
        ],
        [
            *train,
            f"out={kd}",
            "name=kd",
            f"init={models / student.name}",
            "method=kd",
            "train.select=best",
            f"train.updates={KD_UPDATES}",
            *places.overrides,
        ],
    ]
    for method in places.methods:
        if method != "kd":
            made.append(
                [
                    *train,
                    f"out={places.out / name / method}",
                    f"name={method}",
                    f"init={kd}",
                    f"method={method}",
                    f"train.updates={SECOND_UPDATES}",
                    *places.overrides,
                ]
            )
    for method in dict.fromkeys(("kd", *places.methods)):
        run = places.out / name / method
        made.append(
            [
                *spread,
                "evaluate",
                str(run),
                "--protocol",
                student.family,
                "--reference",
                str(places.downloads / REFERENCE),
                "--out",
                str(run / "official.json"),
            ]
        )
    return made


def _views(family: str) -> list[str]:
    """LlamaGen trains on ten crops (its published augmentation), ARPG on the center crop and its mirror image."""
    return ["--ten-crop", "1.1"] if family == "llamagen" else ["--flip"]


def needs(name: str, places: Places) -> dict[str, float]:
    """GB that a row writes to disk, and GB of GPU memory for weights and optimizer before any activation."""
    chosen = row(name)
    student, teacher = zoo.entry(chosen.student), zoo.entry(chosen.teacher)
    views = _VIEWS if student.family == "llamagen" else 2
    codes = _IMAGES * views * student.codes * 2
    runs = (1 + len(places.methods)) * _CHECKPOINTS * 16 * student.params
    models = 4 * (student.params + teacher.params)
    state = 20 * student.params / places.gpus + 4 * (student.params + teacher.params)
    return {"disk": (codes + runs + models) / 1e9, "gpu": state / 1e9}


def missing(name: str, places: Places) -> list[str]:
    """What a row needs and does not find, one line each."""
    chosen = row(name)
    student, teacher = zoo.entry(chosen.student), zoo.entry(chosen.teacher)
    tokenizer = next(known for known in zoo.TOKENIZERS if known.name == student.tokenizer)
    lines = [
        f"{places.downloads / known.file} (https://huggingface.co/{known.hub})"
        for known in (tokenizer, student, teacher)
        if not (places.downloads / known.file).is_file()
    ]
    if not (places.downloads / REFERENCE).is_file():
        lines.append(f"{places.downloads / REFERENCE} (guided-diffusion's evaluation data)")
    if not places.images.exists():
        lines.append(f"{places.images} (ImageNet's training images, one folder per class)")
    folder = next(parent for parent in (places.out.absolute(), *places.out.absolute().parents) if parent.is_dir())
    free, need = shutil.disk_usage(folder).free / 1e9, needs(name, places)["disk"]
    if free < need:
        lines.append(f"{need - free:.0f} GB of disk: {need:.0f} GB are needed at {folder}, {free:.0f} GB are free")
    return lines + _missing_gpus(name, places)


def _missing_gpus(name: str, places: Places) -> list[str]:
    import torch

    there = torch.cuda.device_count()
    if there < places.gpus:
        return [f"{places.gpus} GPUs: {there} are visible (--gpus says how many to use)"]
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    need = needs(name, places)["gpu"]
    return [f"GPU memory: weights and optimizer take {need:.0f} GB of {memory:.0f} GB"] if need > 0.8 * memory else []


def describe(name: str, places: Places) -> str:
    """The paper's numbers, the commands, and what is missing, as text."""
    chosen, need = row(name), needs(name, places)
    header = f"{'':12s} {'FID':>6s} {'IS':>7s} {'prec.':>6s} {'recall':>6s}"
    numbers = [
        f"{_STAGES.get(stage, 'student'):12s} {fid:6.2f} {score:7.1f} {precision:6.2f} {recall:6.2f}"
        for stage, (fid, score, precision, recall) in chosen.paper.items()
    ]
    absent = missing(name, places)
    return "\n".join(
        [
            f"# {chosen.student} <- {chosen.teacher}, {chosen.image_size} px. The paper reports (50,000 samples):",
            *(f"#   {line}" for line in (header, *numbers)),
            f"# Writes about {need['disk']:.0f} GB; weights and optimizer take {need['gpu']:.1f} GB on each GPU.",
            *(shlex.join(command) for command in commands(name, places)),
            *(f"# missing: {line}" for line in absent),
        ]
    )


def already_made(command: Sequence[str]) -> bool:
    """Whether an import or a conversion is done; every other command finds out by itself."""
    if "import" not in command and "convert" not in command:
        return False
    return (Path(command[list(command).index("--out") + 1]) / "config.json").is_file()


def reproduce(name: str, places: Places) -> None:
    """Run every command of a row, one after the other.

    Raises:
        VarkdError: something is missing, or a command failed.
    """
    absent = missing(name, places)
    if absent:
        raise VarkdError(f"{name} cannot start, missing: {'; '.join(absent)} (--dry-run prints the commands)")
    for command in commands(name, places):
        if already_made(command):
            continue
        console.print(shlex.join(command))
        code = subprocess.run(command, check=False).returncode
        if code:
            raise VarkdError(f"stopped with exit code {code}: {shlex.join(command)}")
