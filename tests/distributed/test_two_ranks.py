"""Two ranks are one: the same losses and weights, whatever is sharded, replicated, resumed or encoded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_runs import (
    FROM_THE_START,
    OTHER_PARTS,
    arguments,
    checkpoint,
    largest_difference,
    log,
    relative_difference,
    stop_after,
    train,
)
from varkd.backbones.store import build, family_class, save_backbone
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.run.data import Codes
from varkd.train.parallel import distribute
from varkd.world import World

SECONDS = 240
OTHERS = ("arpg", "randar", "rar", "var")
# One student row in eight, and a teacher that samples: one rank has nothing to sample, and keeps no ring, for a while.
FEW = (
    "method=best_of_n", "method.contexts.shares.0.fraction=0.875", "method.contexts.shares.1.fraction=0.125",
    "train.micro_batches=2", "method.terms.student.normalizer=selected",
)  # fmt: skip
PRESETS: dict[str, tuple[str, ...]] = {
    "atkd": (), "distillm2": (), "iwopd": (), "minillm": (), "miniplm": (), "selectkd_spec": (), "seqinter": (),
    "skd": (), "taid": (), "varkd": ("method.contexts.shares.1.fraction=0.5",),
    "distillm": ("method.contexts.shares.1.fraction.tolerance=-10", "method.contexts.shares.1.fraction.step=0.3"),
    "imitation_mix": ("train.micro_batches=2",),
}  # fmt: skip
"""What best of n does not do: rows decode in parallel from prefixes of their own, two models decode at once, the
student is scored, numbers adapt."""
SHORT = ("train.updates=3", "train.validate_every=1")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def exported(folder: Path, family: str, data: Path) -> Path:
    """A random teacher with opinions, in this family's own order of codes."""
    codes = Codes(data)
    sizes = {**family_class(family).sizes_for(codes.layout), "num_layers": 2, "dim": 32, "num_heads": 2}
    model = build(family, sizes, seed=1, quantizer=codes.tokenizer.quantizer)
    torch.nn.init.normal_(model.head.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    save_backbone(model, folder / f"teacher-{family}")
    return folder / f"teacher-{family}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, codes: Path, scale_codes: Path, teacher: Path) -> Path:
    """`one/NAME` trained here, `two/NAME` by two ranks; `two/codes` encoded by two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    best = (*FROM_THE_START, f"teacher={teacher}")
    data = {family: scale_codes if family == "var" else codes for family in OTHERS}
    families = {
        family: (*FROM_THE_START, f"model.family={family}", "model.num_layers=2",
                 f"teacher={exported(folder, family, data[family])}")
        for family in OTHERS
    }  # fmt: skip
    presets = {
        name: (*SHORT, f"method={name}", f"teacher={teacher}", *overrides) for name, overrides in PRESETS.items()
    }
    settings = {
        **families,
        **presets,
        "best_of_n": best,
        "few": (*FEW, f"teacher={teacher}"),
        "parts": (*OTHER_PARTS, "train.micro_batches=2", f"teacher={teacher}"),
        "replicas": (*best, "train.replicas=2"),
        "clipped": ("method=kd", f"teacher={teacher}", "train.optim.clip=0.05", "train.micro_batches=2"),
        "quantized": ("method=kd", f"teacher={teacher}", "train.quantize=int8"),
        "from_two": best,
        "from_one": best,
    }
    for name, overrides in settings.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "from_one":  # one rank begins it in the folder where two ranks will go on
                stop_after(patch, 3)
                assert main(arguments(folder / "two" / name, codes, *overrides)) == 143
            elif name != "from_two":
                train(folder / "one" / name, data.get(name, codes), *overrides)
    jobs: list[dict] = [
        {
            "verb": "stop" if name == "from_two" else "train",
            "command": arguments(folder / "two" / name, data.get(name, codes), *overrides),
        }
        for name, overrides in settings.items()
    ]
    jobs.append({"verb": "encode", "out": str(folder / "two" / "codes")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def assert_same_run(one: Path, two: Path, updates: int = 6) -> None:
    """The same losses to 1e-6 and, after all updates, the same weights, averages and method state."""
    first, second = log(one), log(two)
    assert [(line["split"], line["step"]) for line in first] == [(line["split"], line["step"]) for line in second]
    for line, other in zip(first, second, strict=True):
        assert line.keys() == other.keys()
        if line["split"] == "warning":
            assert line["rule"] == other["rule"]
            continue
        loss = "ce" if line["split"] == "validation" else "loss"
        assert line[loss] == pytest.approx(other[loss], abs=1e-6)
        for name in line.keys() - {"split", "step"}:
            assert line[name] == pytest.approx(other[name], abs=1e-5), name
    for part in ("student", "ema"):
        assert relative_difference(one, two, updates, part) < 5e-6
        assert largest_difference(one, two, updates, part) < 1e-4
    assert sorted(checkpoint(one, updates)) == sorted(checkpoint(two, updates))


@pytest.mark.parametrize("name", ["best_of_n", "few", "parts", "replicas", "clipped", "quantized", *OTHERS])
def test_two_ranks_train_like_one(runs: Path, name: str):
    assert_same_run(runs / "one" / name, runs / "two" / name)


@pytest.mark.parametrize("name", PRESETS)
def test_two_ranks_train_a_preset_like_one(runs: Path, name: str):
    one, two = runs / "one" / name, runs / "two" / name
    assert_same_run(one, two, updates=3)
    state, other = checkpoint(one, 3), checkpoint(two, 3)
    for key in state:
        if key.startswith("method/"):
            torch.testing.assert_close(other[key], state[key], rtol=1e-4, atol=1e-5)
    if name == "miniplm":
        assert (one / "images.npy").read_bytes() == (two / "images.npy").read_bytes()


def test_the_replay_buffer_and_the_thresholds_are_those_of_one_rank(runs: Path):
    first, second = (checkpoint(runs / ranks / "best_of_n", 6) for ranks in ("one", "two"))
    for name in ("row", "born", "label", "codes"):
        key = f"method/rows/replay_{name}"
        assert first[key].tolist() == second[key].tolist(), name
    np.testing.assert_allclose(first["method/threshold/student"], second["method/threshold/student"], atol=1e-6)


def test_a_checkpoint_of_two_ranks_goes_on_with_one(runs: Path, codes: Path, teacher: Path):
    run = runs / "two" / "from_two"
    assert not (run / "checkpoints" / "step-00000006").exists()
    train(run, codes, *FROM_THE_START, f"teacher={teacher}")
    assert_same_run(runs / "one" / "best_of_n", run)


def test_a_checkpoint_of_one_rank_goes_on_with_two(runs: Path):
    assert_same_run(runs / "one" / "best_of_n", runs / "two" / "from_one")


def test_two_ranks_encode_like_one(runs: Path, tmp_path: Path):
    from varkd.run.data import encode

    encode("digits", "pixels", tmp_path / "codes", shifts=1, shard_size=500, quiet=True)
    names = sorted(path.name for path in (tmp_path / "codes").glob("*.npy"))
    assert len(names) == 10
    for name in [*names, "manifest.json", "reconstruction.png"]:
        assert (tmp_path / "codes" / name).read_bytes() == (runs / "two" / "codes" / name).read_bytes(), name


def test_the_command_line_under_torchrun(tmp_path: Path, codes: Path):
    """Prints once, and trains like one process."""
    done = torchrun("-m", "varkd.cli", *arguments(tmp_path / "two", codes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [str(tmp_path / "two")]
    assert_same_run(train(tmp_path / "one", codes), tmp_path / "two")


def test_bad_input_under_torchrun_ends_with_the_line(tmp_path: Path, codes: Path):
    done = torchrun("-m", "varkd.cli", *arguments(tmp_path / "two", codes, "method=kd"))
    assert done.returncode != 0
    assert "varkd: error: method 'kd' needs a teacher: give teacher=RUN" in done.stderr
    assert not (tmp_path / "two").exists()


def test_what_does_not_divide_is_refused(make_model):
    with pytest.raises(VarkdError, match="2 ranks cannot hold 3 replicas"):
        distribute(make_model(0), World(0, 2), replicas=3)
    model = make_model(0)
    assert distribute(model, World(), replicas=1) is model
