"""The model card: what a run's files say, in the order in which a reader asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from varkd.distill.inputs import told
from varkd.publishing.facts import Publication, Teacher, without_folders
from varkd.publishing.metadata import PLAIN, front_matter
from varkd.report import sections
from varkd.report.protocol import as_text
from varkd.report.tables import COLUMNS, Column, Row, compact, comparison_table

_NAMED = 100
"""Class names up to this number stand in the card."""
_AGREEMENT = ("forward_kl", "reverse_kl", "acceptance", "top1")
"""What the card says of the agreement with the teacher; the run's report has the rest."""


def model_card(publication: Publication) -> str:
    """The whole README.md."""
    parts = [
        _title(publication),
        _usage(publication),
        _numbers(publication),
        _making(publication),
        _classes(publication),
        _license(publication),
        _limits(publication),
    ]
    return front_matter(publication) + "\n" + "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _title(publication: Publication) -> list[str]:
    training = publication.training
    taught = f", distilled from `{training.teacher.name}`" if training and training.teacher else ""
    rows = "" if publication.columns == 1 else f" (columns: {_shown(publication)})"
    how = told(publication.sampler)[2:-1] or "plain sampling, no guidance"
    return [
        f"# {_escaped(publication.name)}",
        "",
        f"{_kind(publication)}{taught}. It draws {_size(publication)} images of "
        f"{publication.model.num_classes:,} classes.",
        "",
        "![samples](samples.png)",
        "",
        f"Samples with seed {publication.seed}, none left out{rows}; {how}.",
    ]


def _kind(publication: Publication) -> str:
    model = publication.model
    params = compact(sum(parameter.numel() for parameter in model.parameters()))
    return f"A class-conditional autoregressive image model ({type(model).__name__}, {params} parameters)"


def _size(publication: Publication) -> str:
    channels, height, width = publication.tokenizer.image_shape
    return f"{height}x{width} {'gray' if channels == 1 else 'color'}"


def _shown(publication: Publication) -> str:
    return ", ".join(_escaped(publication.class_names[label]) for label in shown_labels(publication))


def shown_labels(publication: Publication) -> list[int]:
    """The classes of the sample grid, one a column: all, or as many spread evenly over them."""
    count, columns = publication.model.num_classes, publication.columns
    return [column * count // columns for column in range(columns)]


def _usage(publication: Publication) -> list[str]:
    place = publication.repo_id or "path/to/this/folder"
    labels = shown_labels(publication)
    varkd = [
        "```python",
        "import varkd",
        "",
        f'model = varkd.Backbone.from_pretrained("{place}")',
        f'tokenizer = varkd.Tokenizer.from_pretrained("{place}")',
        f"sampler = varkd.Sampler({_arguments(publication)})",
        f"images = varkd.generate(model, tokenizer, {labels}, sampler, seed={publication.seed})  # uint8 (N, C, H, W)",
        "```",
    ]
    files = ", ".join(f"`{path}`" for path in publication.code_files)
    return [
        "## Use",
        "",
        "In diffusers; varkd is not needed:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)',
        f"images = pipe(class_labels={labels}, seed={publication.seed}).images  # the first row above",
        "```",
        "",
        f"`trust_remote_code=True` runs three files of this repository: {files}. Calls take `guidance_scale`, "
        "`temperature`, `top_k`, `top_p`, `num_inference_steps`, `generator` and `output_type`; what is left out is as "
        "in the samples above. The same seed gives the same codes as in varkd:",
        "",
        *varkd,
    ]


def _arguments(publication: Publication) -> str:
    usual, own = vars(type(publication.sampler)()), vars(publication.sampler)
    return ", ".join(f"{name}={value!r}" for name, value in own.items() if value != usual[name])


def _numbers(publication: Publication) -> list[str]:
    run = publication.run
    if run is None or run.metrics is None:
        return ["## Evaluation", "", "Nothing was measured: this card makes no claim about quality."]
    rows = comparison_table([run.metrics])
    lines = ["## Evaluation", "", *_table(COLUMNS, rows[0])]
    if floors := sections.floors([run]):
        reached = "; ".join(f"{who}: {number}" for who, number in floors)
        lines += ["", f"What FD can be expected to reach here: {reached}."]
    columns, agreement = sections.agreement([run], rows)
    if agreement:
        counts = "; ".join(sections.agreement_counts([run]))
        shown = [column for column in columns if column.key.split("/")[0] in _AGREEMENT]
        lines += ["", f"Agreement with the teacher ({counts}):", "", *_table(shown, agreement[0])]
    return [*lines, "", *_protocol(run.metrics)]


def _table(columns: Sequence[Column], row: Row) -> list[str]:
    lines = ["| | value | 95% interval | |", "|---|---|---|---|"]
    for column in columns:
        cell = row.cells[column.key]
        if cell.value is not None:
            better = f"; {column.better} is better" if column.better and column.key not in PLAIN else ""
            meaning = f"{column.meaning}{better}".replace("|", "\\|")
            lines.append(f"| {column.title} | {cell.text} | {cell.interval} | {meaning} |")
    return lines


def _protocol(metrics: Mapping[str, Any]) -> list[str]:
    """How the numbers were measured, a line each; paths of the machine are left out."""
    protocol = metrics.get("protocol") or {}
    features = protocol.get("features")
    shown = {
        "samples": f"{metrics['num_samples']:,}, labels {protocol.get('labels', 'not stated')}, seed "
        f"{as_text(protocol.get('seed'))}",
        "reference": _named(protocol.get("reference")),
        "features": _named(
            {key: features.get(key) for key in ("name", "hash", "accuracy")}
            if isinstance(features, Mapping)
            else features
        ),
        "sampler": as_text(protocol.get("sampler")),
        "weights": f"{as_text(protocol.get('weights'))} of {as_text(protocol.get('checkpoint'))}",
        "tokenizer": as_text(protocol.get("tokenizer")),
        "training seed": as_text(protocol.get("training_seed")),
        "versions": as_text(protocol.get("versions")),
    }
    return ["Protocol:", "", *(f"- {name}: {text}" for name, text in shown.items())]


def _named(value: Any) -> str:
    """What images or a feature network are recorded as, without the folders that its name may hold."""
    known = isinstance(value, Mapping) and isinstance(value.get("name"), str)
    return as_text({**value, "name": without_folders(value["name"])} if known else value)


def _making(publication: Publication) -> list[str]:
    training = publication.training
    if training is None:
        return ["## Training", "", "The files of its training were not published with it."]
    changed = " (some of its settings were changed; the words below are those of this run)" if training.changed else ""
    begun = f" It started from the weights of `{training.start}`." if training.start else ""
    material = f"{training.num_images:,} images of {_escaped(training.data)}"
    if training.num_sampled is not None:
        material = f"{training.num_sampled:,} samples of a teacher, not on images (classes: {_escaped(training.data)})"
    return [
        "## Training",
        "",
        f"{training.updates:,} updates of {training.batch_size} sequences each, on {material}.{begun}",
        "",
        *([f"Teacher: {_teacher(training.teacher)}.", ""] if training.teacher else []),
        f"Method: **{training.preset}**{changed}. {training.summary} Source: {training.source}. In words:",
        "",
        "```text",
        *training.method,
        "```",
        "",
        f"Tokenizer: {publication.tokenizer.kind}, {publication.tokenizer.vocab_size:,} codes, "
        f"{publication.tokenizer.sequence_length:,} an image (hash {publication.tokenizer.hash[:12]}).",
    ]


def _teacher(teacher: Teacher) -> str:
    sizes, described = teacher.config or {}, ""
    if {"family", "num_layers", "dim"} <= sizes.keys():
        described = f", {sizes['family']}, layers: {sizes['num_layers']}, width: {sizes['dim']}"
    return f"`{teacher.name}`{described} (weights hash {teacher.hash[:12]})"


def _classes(publication: Publication) -> list[str]:
    names, count = publication.class_names, publication.model.num_classes
    if publication.model.class_names is None:
        return ["## Classes", "", f"Labels 0 to {count - 1}; nobody named them."]
    if names == tuple(map(str, range(count))):
        return ["## Classes", "", f"Labels 0 to {count - 1}, whose names are the same numbers."]
    if count > _NAMED:
        return ["## Classes", "", f"Labels 0 to {count - 1}; `model/config.json` holds their names."]
    return ["## Classes", "", ", ".join(f"{label}: {_escaped(name)}" for label, name in enumerate(names))]


def _license(publication: Publication) -> list[str]:
    origin = _origin(publication)
    if publication.license is None:
        return ["## License", "", f"Unknown; {origin}"]
    return ["## License", "", f"{publication.license}, as stated by who published this; {origin}"]


def _origin(publication: Publication) -> str:
    training = publication.training
    sources = [f"the model `{publication.base_model}`"] if publication.base_model else []
    if training is not None:
        sources += [f"the teacher `{training.teacher.name}`"] if training.teacher else []
        sources += [f"the weights of `{training.start}`"] if training.start else []
        sources += [f"images of {_escaped(training.data)}"]
    named = " and ".join([", ".join(sources[:-1]), sources[-1]] if len(sources) > 1 else sources)
    named = named or "a model and images that are not named here"
    return f"the weights derive from {named}, whose terms may apply."


def _limits(publication: Publication) -> list[str]:
    measured = publication.run is not None and publication.run.metrics is not None
    lines = [
        f"It knows the {publication.model.num_classes:,} classes above and one size, {_size(publication)} pixels. What "
        "the training images lack or distort, it lacks or distorts too.",
    ]
    if measured:
        lines.append(
            "FD, precision and recall are measured on features of a small network fitted to the same data, "
            "not on Inception features: they compare runs on these data under this protocol, and are not the "
            "FID of papers."
        )
        lines.append("The intervals are of the evaluation's samples alone: they say nothing of other training seeds.")
    if _was_parallel(publication):
        lines.append(
            "The numbers were measured with parallel decoding (ZipAR); the samples above and the pipeline "
            "decode one step after the other."
        )
    lines.append("Nothing filters or marks its images.")
    return ["## Limits", "", *(f"- {line}" for line in lines)]


def _was_parallel(publication: Publication) -> bool:
    """Whether the numbers are of another way of decoding than what is published."""
    protocol = ((publication.run and publication.run.metrics) or {}).get("protocol") or {}
    return (protocol.get("sampler") or {}).get("parallel", "off") != "off"


def _escaped(text: str) -> str:
    """Text of a user inside Markdown: on one line, with nothing that could be read as markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in " ".join(text.split()))


def id_to_label(publication: Publication) -> dict[str, str]:
    """Class names as `model_index.json` holds them (a mapping: diffusers takes lists for components)."""
    return {str(label): name for label, name in enumerate(publication.class_names)}


def record(publication: Publication, version: str) -> dict[str, Any]:
    """`varkd.json`: what the folder is, for programs; no path of the machine that wrote it."""
    metrics = publication.run.metrics["metrics"] if publication.run and publication.run.metrics else None
    kept = {key: {end: value.get(end) for end in ("value", "low", "high")} for key, value in (metrics or {}).items()}
    return {
        "name": publication.name,
        "varkd": version,
        "family": publication.model.family,
        "sampler": json.loads(json.dumps(vars(publication.sampler))),
        "class_names": list(publication.class_names),
        "tokenizer_hash": publication.tokenizer.hash,
        "license": publication.license,
        "base_model": publication.base_model,
        "metrics": kept or None,
    }
