"""The page of `varkd analyze`, made from the files of an analysis folder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from varkd.files import write_text
from varkd.report import audits, panels, readings
from varkd.report.analysis import Analysis, read_analysis
from varkd.report.html import render_template
from varkd.report.readings import Section, plain, told

SECTIONS: tuple[Callable[[Analysis], Section], ...] = (
    readings.entropy, readings.drift, readings.divergence, readings.accumulation, readings.choice, readings.acceptance,
    readings.distance, readings.ambiguity, audits.swap, audits.teachers, audits.calibration,
    audits.selection, audits.coverage, audits.cost,
    panels.codebook, panels.continuations,
)  # fmt: skip
_NUMBERS = {
    "teacher_entropy": "Teacher entropy H(p), nats",
    "ce_teacher": "Teacher's -log p of the codes, nats",
    "typicality": "Typicality z, sd",
    "forward_kl": "KL(teacher || student), nats",
    "reverse_kl": "KL(student || teacher), nats",
    "total_variation": "Total variation",
    "top1": "Same top code",
    "top1_cluster": "Same top cluster",
    "acceptance": "Acceptance",
    "acceptance_neighbors": "Acceptance with neighbors",
    "mean_gap": "|mu_p - mu_q|^2",
    "n90": "N90 of the teacher, codes",
    "max_prob": "Largest p",
}


def write_page(folder: Path) -> Path:
    """Read `folder` and write its `index.html`: one page that needs no network and no other file.

    Raises:
        VarkdError: no analysis there, a damaged file, or the page cannot be written.
    """
    path = folder / "index.html"
    write_text(path, render(read_analysis(folder)))
    return path


def render(found: Analysis) -> str:
    """The page as text. Whatever comes from disk is escaped."""
    return render_template(
        "diagnostics.html.j2",
        title=f"Diagnostics of {found.info['name']}",
        statement=statement(found),
        facts=facts(found),
        numbers=numbers(found),
        sections=[make(found) for make in SECTIONS],
        num=found.info["num"],
    )


def statement(found: Analysis) -> list[str]:
    """What was compared, on how many sequences."""
    info = found.info
    asked = (
        ""
        if info["num"] >= info["num_asked"]
        else f" (the {info['split']} split has no more; {info['num_asked']:,} were asked for)"
    )
    method = f" ({info['method']})" if info["method"] else ""
    trained = (
        " Data prefixes are training data: both models have seen them, and so has the reference of image metrics."
        if info["split"] == "train"
        else ""
    )
    return [
        f"This page looks at the student {info['name']}{method} and its teacher on N = {info['num']:,} sequences of "
        f"the {info['split']} split{asked}, and on as many that the teacher and the student sampled for the same "
        f"labels, under the same plans and noise.{trained}",
        "Bands and brackets are 95 % bootstrap intervals over sequences of these two models: about one of twenty "
        "misses its number by chance, and another training seed may move a number further.",
    ]


def facts(found: Analysis) -> list[tuple[str, str]]:
    """What somebody needs who wants the same numbers."""
    info = found.info
    named = {key: info["sampler"][key] for key in ("temperature", "top_k", "top_p", "guidance", "steps")}
    sampler = ", ".join(f"{key} {value}" for key, value in named.items() if value is not None)
    layout = f"scales {info['scales']}" if info["scales"] else f"a grid of {info['grid'][0]} x {info['grid'][1]}"
    features = info["features"]
    return [
        ("Student", f"{info['student']} ({info['families'][0]}, {info['parameters']['student']:,} parameters)"),
        ("Teacher", f"{info['teacher']} ({info['families'][1]}, {info['parameters']['teacher']:,} parameters)"),
        ("Second teacher", info["second"] or "none given"),
        ("Data", f"{info['data']}, {info['split']} split, N = {info['num']:,}, seed {info['seed']}"),
        (
            "Codes",
            f"{info['sequence_length']} a sequence on {layout}, V = {info['vocab_size']:,}, tokenizer "
            f"{info['tokenizer'][:12]}",
        ),
        ("Order", f"{info['steps']} steps, {'raster' if info['raster'] else 'drawn by the student'}"),
        ("Sampler", sampler),
        ("Labels", "as many of each class as the data have: " + ", ".join(map(str, info["labels"]))),
        ("Clusters", f"{info['code_space']['clusters']} ({info['code_space']['assignment']})"),
        ("Feature network", f"{features['name']}, hash {features['hash'][:8]}, N = {features['num_train']:,}"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in info["versions"].items())),
    ]


def numbers(found: Analysis) -> list[tuple[str, list[str], str, bool]]:
    """(quantity, its mean in the three contexts, student minus data, whether that interval leaves out 0)."""
    rows = []
    for quantity, label in _NUMBERS.items():
        means = [plain(found.mean(context, quantity).value) for context in ("data", "teacher", "student")]
        gap = found.mean("student - data", quantity)
        rows.append((label, means, told(gap), gap.sign != 0))
    return rows
