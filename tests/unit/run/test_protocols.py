"""The official evaluations: what each family draws, in which order, by which settings; and one run judged by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import adm_inputs as inputs
from tiny_runs import train
from varkd.backbones import zoo
from varkd.backbones.published import PUBLISHED
from varkd.backbones.store import FAMILIES
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.run.models import load_trained
from varkd.run.protocols import FAMILIES as PROTOCOLS
from varkd.run.protocols import RANKS, labels, plan, zoo_entry


def test_every_family_has_a_protocol_and_every_model_its_numbers():
    assert set(PROTOCOLS) == set(FAMILIES)
    assert set(PUBLISHED) == {entry.name for entry in zoo.ENTRIES}
    assert [entry.name for entry in zoo.ENTRIES if PUBLISHED[entry.name].fid != entry.fid] == []
    assert all("published" in row for row in zoo.describe())


def test_random_labels_are_uniform():
    label_N = labels("random", 50_000, 1000, 0)
    counts = torch.bincount(label_N, minlength=1000).double()
    assert 6.5 < counts.std() < 7.7, "multinomial: about sqrt(50)"
    assert not torch.equal(label_N, labels("random", 50_000, 1000, 1))


def test_balanced_labels_by_rank_are_those_of_the_official_script():
    """ARPG and RAR: rank r takes [r N/W, (r + 1) N/W) of 0..999 repeated; image i of a rank is file i W + r."""
    num, num_classes = 50_000, 1000
    repeated = np.tile(np.arange(num_classes), num // num_classes)
    file_N = np.empty(num, dtype=np.int64)
    for rank in range(RANKS):
        own = repeated[rank * num // RANKS : (rank + 1) * num // RANKS]
        file_N[np.arange(len(own)) * RANKS + rank] = own
    found = labels("balanced by rank", num, num_classes, 42)
    assert np.array_equal(found.numpy(), file_N)
    assert torch.bincount(found).tolist() == [50] * num_classes


class Tiny:
    """What `plan` asks of a model and a tokenizer, without weights."""

    def __init__(self, family: str, config: dict[str, object], side: int, length: int) -> None:
        self.family, self.config, self.num_classes = family, type("Config", (), {})(), 1000
        vars(self.config).update(config)
        self.image_shape, self.sequence_length = (3, side, side), length


def planned(name: str, **options: object):
    entry = zoo.entry(name)
    model = Tiny(entry.family, entry.config, entry.resolution, entry.codes)
    return plan(entry.family, model, model, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_a_published_model_takes_its_published_settings(entry: zoo.Entry):
    if entry.sampling["guidance"] is None:
        with pytest.raises(VarkdError, match="nobody states the guidance scale"):
            planned(entry.name)
        found = planned(entry.name, changes={"guidance": 2.0})
    else:
        found = planned(entry.name)
    sampler = found.drawing.sampler
    stated = {key: value for key, value in entry.sampling.items() if value is not None}
    assert {key: getattr(sampler, key) for key in stated} == stated
    assert found.model_name == entry.name and found.published == PUBLISHED[entry.name]
    assert found.drawing.num == 50_000
    assert found.drawing.resize == (256 if entry.resolution > 256 and entry.family != "var" else None)


def test_seeds_and_file_orders():
    assert planned("RAR-B").drawing.seed == 42 and planned("ARPG-L").drawing.seed == 0
    assert planned("VAR-d16").drawing.order == "shuffled" and planned("RAR-B").drawing.order == "given"
    assert planned("RAR-L").drawing.sampler.temperature == 1.02


def test_protocols_of_other_families_are_refused():
    entry = zoo.entry("RAR-B")
    model = Tiny("rar", entry.config, 256, 256)
    with pytest.raises(VarkdError, match="is for var models, this one is rar"):
        plan("var", model, model)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, codes: Path, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("student") / "kd", codes, "method=kd", f"teacher={teacher}")


def test_a_student_takes_the_familys_settings_and_its_own_guidance(student: Path):
    _, codes, model = load_trained(student, "cpu")
    assert zoo_entry(model, codes.tokenizer) is None
    own = Sampler(temperature=0.5, top_k=3, guidance=1.7)
    found = plan("llamagen", model, codes.tokenizer, 20, own=own)
    assert found.drawing.sampler == Sampler(temperature=1.0, top_k=0, guidance=1.7)
    assert found.published is None and "nothing" not in str(found.card()["published"])


def test_a_run_is_drawn_judged_and_searched(tmp_path: Path, student: Path, capsys: pytest.CaptureFixture[str]):
    weights, real = tmp_path / "weights.pth", tmp_path / "real.npz"
    torch.save({name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}, weights)
    np.savez(real, inputs.images(3, 0, 8, 8))
    command = ["evaluate", student, "--protocol", "llamagen", "--reference", real, "--inception", weights,
               "--num", "6", "--device", "cpu", "--resamples", "0", "--json"]  # fmt: skip
    searching = ("--search-guidance", "1", "2", "--search-num", "5")
    assert main([str(part) for part in (*command, *searching)]) == 0
    first = json.loads(capsys.readouterr().out)
    tried = {row["guidance"]: row["fid"] for row in first["search"]}
    assert first["card"]["sampler"]["guidance"] == min(tried, key=lambda scale: tried[scale])
    assert set(tried) == {1.0, 2.0} and first["protocol"]["drawn"]["labels"] == "random"
    best = first["card"]["sampler"]["guidance"]
    assert main([str(part) for part in (*command, "--guidance", best)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in ("fid", "is", "recall")} == {
        name: first[name] for name in ("fid", "is", "recall")
    }
    assert (student / "evaluation" / "llamagen.json").is_file()
    assert main([str(part) for part in command[:-1]]) == 0
    out = capsys.readouterr().out
    assert "departure" in out and "published" in out and "uint8" in out
