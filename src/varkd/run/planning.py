"""`varkd plan`: what a training run takes, in parameters, memory, FLOPs and time, before anything runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from varkd.backbones import zoo
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import family_class, sizes_of
from varkd.config import RunConfig
from varkd.data.remote import is_url
from varkd.distill.scores import affordable_rows
from varkd.errors import VarkdError
from varkd.files import read_json
from varkd.rollout import Sampler
from varkd.run.data import codes_at, pick_device
from varkd.run.models import trained_method
from varkd.train.probe import Amount, Phases, Probe

_GIB = 2**30
_MAIN = ("student decode", "teacher decode", "student read", "teacher read", "train", "loss", "optimizer")


@dataclass(frozen=True)
class Device:
    """A device that is not at hand: peak FLOP/s and the share of it that is reached, bytes/s."""

    flops: float
    bandwidth: float
    utilization: float = 0.4


@dataclass(frozen=True)
class _Model:
    family: str
    sizes: dict[str, Any]

    def blank(self) -> Backbone:
        model_class: Any = family_class(self.family)
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in self.sizes.items()}
        with torch.device("meta"):
            return model_class(model_class.config_class(**sizes), 0.0)


def plan_run(
    run: RunConfig, *, devices: int = 1, machine: Device | None = None, memory: float | None = None
) -> dict[str, Any]:
    """What `run` takes on `devices` devices, for people (`format_plan`) and as JSON.

    Without `machine` the phases are timed here, on shallow models; with one, seconds are computed: the FLOPs at its
    utilization, and a decode step not faster than its weights are read.

    Args:
        run: `teacher` and `init` are folders, or names of published models (`varkd zoo`); where the codes folder is not
            made yet, one of them says what the codes are.
        memory: GiB of one device; the plan then says how many micro-batches and devices it takes.

    Raises:
        VarkdError: nothing says what the codes are, or a model is unknown.
    """
    if _stands(run.data):
        run = replace(run, method=trained_method(run.method, codes_at(run.data)))
    student, teacher = _models(run)
    if devices < 1 or run.train.batch_size % devices:
        raise VarkdError(f"{devices} devices cannot share a batch of {run.train.batch_size}: choose a divisor")
    batch = run.train.batch_size // devices
    micro = batch // run.train.micro_batches or 1
    cost = run.method.at(0.0).cost
    decoded = {name: cost[f"{name}_decode"] for name in ("student", "teacher")}
    sampler = next(iter(run.method.contexts.samplers), Sampler())
    bf16 = run.train.precision == "bf16"
    probe = Probe(
        micro,
        max(1, round(batch * max(*decoded.values(), 1e-9))) if any(decoded.values()) else 1,
        sampler,
        bf16,
        machine is None,
        pick_device(run.device),
    )
    own = probe.phases(student.family, student.sizes, True, decoded["student"] > 0)
    taught = teacher and probe.phases(teacher.family, teacher.sizes, False, decoded["teacher"] > 0)
    length = student.blank().sequence_length
    loss = probe.loss(student.sizes, teacher.sizes["dim"] if teacher else None, length)
    phases = _per_update(cost, batch, probe, own, taught, loss)
    if machine is not None:
        phases = {name: _at(machine, amount) for name, amount in phases.items()}
        phases = _read_bound(phases, machine, student, teacher, length, sampler, bf16)
    held = _memory(run, student, teacher, devices, micro, own, probe, cost, length)
    seconds = sum(amount.seconds or 0.0 for amount in phases.values())
    parameters = {"student": _count(student), **({"teacher": _count(teacher)} if teacher else {})}
    return {
        "method": run.preset,
        "student": student.family,
        "parameters": parameters,
        "batch_size": run.train.batch_size,
        "micro_batches": run.train.micro_batches,
        "devices": devices,
        "timed": machine is None,
        "phases": {name: {"flops": amount.flops, "seconds": amount.seconds} for name, amount in phases.items()},
        "seconds_per_update": seconds,
        "sequences_per_second": run.train.batch_size / seconds,
        "total_seconds": seconds * run.train.updates,
        "updates": run.train.updates,
        "memory_gib": {name: value / _GIB for name, value in held.items()},
        **({} if memory is None else _fitting(memory, held, devices, batch, micro)),
    }


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    who = ", ".join(f"{name} {count / 1e6:,.1f}M" for name, count in plan["parameters"].items())
    how_many = (
        f"batch {plan['batch_size']} on {plan['devices']} device(s), {plan['micro_batches']} micro-batch(es) each"
    )
    lines = [f"{plan['method']}: {who} parameters; {how_many}", ""]
    lines.append(f"{'phase':<16}{'TFLOP':>10}{'seconds':>10}{'share':>8}")
    total = plan["seconds_per_update"]
    for name, phase in plan["phases"].items():
        share = (phase["seconds"] or 0.0) / total
        lines.append(f"{name:<16}{phase['flops'] / 1e12:>10.3f}{phase['seconds'] or 0.0:>10.3f}{share:>8.0%}")
    how = "timed here on shallow models" if plan["timed"] else "computed for the given device, not measured"
    lines += [
        f"{'one update':<16}{'':>10}{total:>10.3f}   {how}",
        "",
        f"{plan['sequences_per_second']:,.1f} sequences/s; {plan['updates']:,} updates take "
        f"{_duration(plan['total_seconds'])}, validation and checkpoints apart",
        "",
    ]
    lines += [f"{name:<16}{_size(value):>14}" for name, value in plan["memory_gib"].items()]
    if "fits" in plan:
        lines += ["", plan["fits"]]
    return "\n".join(lines)


def _size(gib: float) -> str:
    return f"{gib:,.2f} GiB" if gib >= 1 else f"{gib * 1024:,.1f} MiB"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _models(run: RunConfig) -> tuple[_Model, _Model | None]:
    """Student and teacher, by their folders or by their names in the zoo."""
    teacher = _of(run.teacher) if run.teacher else None
    if run.method.needs_teacher and teacher is None:
        raise VarkdError(f"method '{run.preset}' needs a teacher: give teacher=RUN, or the name of a published model")
    if run.init:
        return _of(run.init), teacher
    chosen = {name: value for name, value in asdict(run.model).items() if name != "family" and value is not None}
    return _Model(run.model.family, {**_layout(run, teacher), **chosen}), teacher


def _of(name: str) -> _Model:
    config = Path(name) / "config.json"
    if config.is_file():
        info = read_json(config)
        return _Model(info["family"], sizes_of(info))
    if Path(name).exists():
        raise VarkdError(f"{name} is no model folder: it has no config.json")
    entry = zoo.entry(name)
    return _Model(entry.family, dict(entry.config))


def _stands(data: str) -> bool:
    """Whether there are codes already."""
    return is_url(data) or (bool(data) and (Path(data) / "manifest.json").is_file())


def _layout(run: RunConfig, teacher: _Model | None) -> dict[str, Any]:
    """The sizes that the codes decide."""
    if _stands(run.data):
        return family_class(run.model.family).sizes_for(codes_at(run.data).layout)
    if teacher is None:
        raise VarkdError(
            f"there are no codes at data={run.data or '(nothing)'} yet: give the codes folder, or a "
            "teacher= or init= (a folder or a name of `varkd zoo`) that says what they are"
        )
    shared = ("vocab_size", "num_classes", "grid", "scales", "code_dim", "num_phi")
    return {name: teacher.sizes[name] for name in shared if name in teacher.sizes}


def _count(model: _Model) -> int:
    return sum(parameter.numel() for parameter in model.blank().parameters())


def _per_update(
    cost: dict[str, float], batch: int, probe: Probe, own: Phases, taught: Phases | None, loss: Amount
) -> dict[str, Amount]:
    """The phases of one update of one device; what was run at a batch is scaled to the rows that the method takes."""
    passes, rollouts = batch / probe.batch_size, batch / probe.decoded
    found = {
        "student decode": own.decode.times(cost["student_decode"] * rollouts),
        "student read": own.read.times(cost["student_read"] * passes),
        "train": own.train.times(cost["student_train"] * passes),
        "loss": loss.times(cost["student_train"] * passes),
        "optimizer": own.optimizer,
    }
    if taught is not None:
        found["teacher decode"] = taught.decode.times(cost["teacher_decode"] * rollouts)
        found["teacher read"] = taught.read.times(cost["teacher_read"] * passes)
    nothing = [name for name, amount in found.items() if not amount.flops and name != "optimizer"]
    return {name: found[name] for name in _MAIN if name in found and name not in nothing}


def _at(machine: Device, amount: Amount) -> Amount:
    return Amount(amount.flops / (machine.flops * machine.utilization), amount.flops, amount.kept_bytes)


def _read_bound(
    phases: dict[str, Amount],
    machine: Device,
    student: _Model,
    teacher: _Model | None,
    length: int,
    sampler: Sampler,
    bf16: bool,
) -> dict[str, Amount]:
    """No decode step is faster than its weights are read, no optimizer step than its state is read and written."""
    bounds = {"optimizer": 36 * _count(student) / machine.bandwidth}
    steps = sampler.steps or length
    for name, model in (("student decode", student), ("teacher decode", teacher)):
        if model is not None:
            bounds[name] = steps * _count(model) * (2 if bf16 else 4) / machine.bandwidth
    return {
        name: Amount(max(amount.seconds or 0.0, bounds.get(name, 0.0)), amount.flops, amount.kept_bytes)
        for name, amount in phases.items()
    }


def _memory(
    run: RunConfig,
    student: _Model,
    teacher: _Model | None,
    devices: int,
    micro: int,
    own: Phases,
    probe: Probe,
    cost: dict[str, float],
    length: int,
) -> dict[str, float]:
    """Bytes on one device by kind; what is sharded is divided by the devices. Weights are float32."""
    size, rows = 4 * _count(student), cost["student_train"]
    chunk = run.train.chunk_rows or affordable_rows(student.sizes["vocab_size"])
    held = {
        "weights": size / devices,
        "gradients": size / devices,
        "optimizer": 2 * size / devices,
        "average": size / devices if run.train.optim.ema else 0.0,
        "teacher": 4 * _count(teacher) / devices if teacher else 0.0,
        "reference": size / devices if run.method.needs_reference else 0.0,
        "activations": own.train.kept_bytes * rows,
        "loss": 32.0 * chunk * student.sizes["vocab_size"]
        + 8.0 * micro * length * student.sizes["dim"]
        + 4.0 * student.sizes["vocab_size"] * student.sizes["dim"],
    }
    caches = [
        (4 if run.train.precision == "fp32" else 2)
        * 2
        * probe.decoded
        * model.sizes["num_layers"]
        * (length + 1)
        * model.sizes["dim"]
        for name, model in (("student", student), ("teacher", teacher))
        if model and cost[f"{name}_decode"]
    ]
    held["KV cache"] = float(sum(caches)) * (2 if probe.sampler.guidance != 1 else 1)
    passing = max(held["activations"] + held["loss"], held["KV cache"])
    static = sum(held[name] for name in ("weights", "gradients", "optimizer", "average", "teacher", "reference"))
    return {**{name: value for name, value in held.items() if value}, "peak": static + passing}


def _fitting(memory: float, held: dict[str, float], devices: int, batch: int, micro: int) -> dict[str, Any]:
    """The fewest micro-batches that fit, and the fewest devices that would hold everything that is sharded."""
    passing = held.get("activations", 0.0)
    fixed = held["peak"] - max(passing + held["loss"], held.get("KV cache", 0.0))
    room = memory * _GIB - fixed - held["loss"]
    per_sequence = passing / micro
    most = math.floor(room / per_sequence) if per_sequence else batch
    fitting = [count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= most]
    decodes = fixed + held.get("KV cache", 0.0) <= memory * _GIB
    if fitting and decodes:
        count = fitting[0]
        told = f"fits {memory:g} GiB with train.micro_batches={count} ({batch // count} sequences at a time)"
        return {"fits": told, "micro_batches_needed": count, "devices_needed": devices}
    left = memory * _GIB - held["loss"] - max(per_sequence, held.get("KV cache", 0.0))
    needed = math.ceil(fixed * devices / left) if left > 0 else None
    told = f"take {needed} devices (FSDP) or more" if needed else "the passes alone do not fit: lower train.batch_size"
    return {
        "fits": f"does not fit {memory:g} GiB on {devices} device(s): {told}",
        "micro_batches_needed": None,
        "devices_needed": needed,
    }
