"""`varkd plan`: counts are exact, depth is extrapolated exactly, and the verb says what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_runs import SETTINGS, train
from varkd.backbones import zoo
from varkd.cli import main
from varkd.config import load_run
from varkd.rollout import Sampler
from varkd.run.planning import Device, plan_run
from varkd.train.probe import Probe

SIZES = {"vocab_size": 32, "num_classes": 3, "grid": (4, 4), "num_layers": 5, "dim": 32, "num_heads": 2, "ffn_dim": 48}
GIB = 2**30


def probe(**changes: object) -> Probe:
    settings = {"batch_size": 3, "decoded": 2, "sampler": Sampler(), "bf16": False, "timed": False,
                "device": torch.device("cpu")}  # fmt: skip
    return Probe(**{**settings, **changes})  # type: ignore[arg-type]


def test_flops_are_those_of_the_products():
    """Two for each weight and position, three passes with the backward one; attention two products of L x L."""
    found = probe().phases("llamagen", SIZES, trained=True, decodes=True)
    length, dim, layers = 16, 32, 5
    weights = layers * (4 * dim * dim + 3 * dim * 48)
    forward = 3 * (2 * length * weights + layers * 2 * (2 * length * length * dim))
    assert found.read.flops == forward
    assert found.train.flops == pytest.approx(3 * forward)
    decoded = 2 * (2 * length * (weights + dim * 32))  # and the head, one code at a time
    assert decoded < found.decode.flops < 1.3 * decoded


@pytest.mark.parametrize("family", ["llamagen", "var", "arpg", "randar", "rar"])
def test_two_shallow_models_say_what_a_deep_one_takes(family: str):
    sizes = {name: size for name, size in SIZES.items() if name != "grid"} | {"num_layers": 6}
    sizes |= {"scales": (1, 2, 4), "code_dim": 8} if family == "var" else {"grid": (4, 4)}
    few, whole = probe().phases(family, sizes, True, True), probe()._measure(family, sizes, True, True)
    assert few.read.flops == whole.read.flops and few.decode.flops == whole.decode.flops
    assert few.train.flops == whole.train.flops
    assert few.train.kept_bytes == pytest.approx(whole.train.kept_bytes, rel=0.02)


def test_time_is_taken_where_asked():
    timed = probe(timed=True).phases("llamagen", SIZES, True, False)
    assert timed.train.seconds and timed.read.seconds and timed.optimizer.seconds
    assert probe().phases("llamagen", SIZES, True, False).train.seconds is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> tuple[Path, Path]:
    return codes, train(tmp_path_factory.mktemp("plan") / "teacher", codes, "method=ce", "model.num_layers=2")


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_of_a_run(folders: tuple[Path, Path], capsys):
    codes, teacher = folders
    base = ("digits-student", f"data={codes}", f"teacher={teacher}", *SETTINGS)
    kd, varkd = (planned(capsys, *base, f"method={name}") for name in ("kd", "varkd"))
    assert kd["timed"] and kd["seconds_per_update"] > 0
    assert "student decode" in varkd["phases"] and "student decode" not in kd["phases"]
    assert kd["phases"]["train"]["flops"] > 0 and set(kd["parameters"]) == {"student", "teacher"}
    assert kd["memory_gib"]["weights"] * GIB == 4 * kd["parameters"]["student"]
    assert kd["memory_gib"]["optimizer"] * GIB == 8 * kd["parameters"]["student"]
    assert main(["plan", *base, "method=varkd"]) == 0
    said = capsys.readouterr().out
    assert "one update" in said and "sequences/s" in said and "timed here" in said


def test_models_of_the_zoo_need_no_files():
    run = load_run("imagenet/llamagen-b", ["teacher=LlamaGen-L-256", "init=LlamaGen-B-256", "train.batch_size=2",
                                           "train.micro_batches=1", "device=cpu"])  # fmt: skip
    plan, sizes = plan_run(run, machine=Device(990e12, 3.35e12), memory=80.0), (("student", "B"), ("teacher", "L"))
    assert plan["parameters"] == {name: zoo.entry(f"LlamaGen-{size}-256").params for name, size in sizes}
    assert not plan["timed"] and plan["micro_batches_needed"] == 1
    passes = 2 * 256 * 2  # two sequences of 256 codes, two FLOPs a weight
    blocks, attention = 12 * (4 * 768 * 768 + 3 * 768 * 2048), 12 * 2 * 256 * 768
    assert plan["phases"]["train"]["flops"] == pytest.approx(3 * passes * (blocks + attention))
    tight = plan_run(run, machine=Device(990e12, 3.35e12), memory=2.0)
    needed = tight["devices_needed"]
    assert tight["micro_batches_needed"] is None and f"take {needed} devices" in tight["fits"]
    static = sum(tight["memory_gib"][name] for name in ("weights", "gradients", "optimizer", "average", "teacher"))
    assert static > 2.0 and static / needed < 2.0 - tight["memory_gib"]["loss"]


def test_a_given_device_is_computed(folders: tuple[Path, Path]):
    codes, teacher = folders
    run = load_run("digits-student", [f"data={codes}", f"teacher={teacher}", "method=kd", *SETTINGS])
    fast, slow = (plan_run(run, machine=Device(flops, 1e15)) for flops in (2e12, 1e12))
    assert slow["seconds_per_update"] == pytest.approx(2 * fast["seconds_per_update"], rel=0.01)
    bound = plan_run(run, machine=Device(1e18, 1e6))
    assert bound["phases"]["optimizer"]["seconds"] == pytest.approx(36 * bound["parameters"]["student"] / 1e6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits-student", "data=none"], "there are no codes"),
        (["digits-student", "data=none", "method=kd"], "needs a teacher"),
        (["digits-student", "data=none", "method=kd", "teacher=LlamaGen-Z"], "no published model"),
        (["mnist-student", "data=none", "init=LlamaGen-B-256", "--devices", "7"], "choose a divisor"),
        (["mnist-student", "data=none", "init=LlamaGen-B-256", "--tflops", "7"], "both --tflops and --bandwidth"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys):
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err
