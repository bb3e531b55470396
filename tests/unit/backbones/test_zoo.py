"""The table of published models: exact, readable, and light."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from varkd.backbones import zoo
from varkd.backbones.store import FAMILIES, build, family_class
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.rollout import Sampler
from varkd.tokenizers.store import KINDS

NAMES = [entry.name for entry in zoo.ENTRIES]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_builds_with_exactly_its_parameters(name: str):
    entry = zoo.entry(name)
    model_class = family_class(entry.family)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**entry.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.params
    assert (model.sequence_length, model.vocab_size, model.num_classes) == (entry.codes, entry.vocab_size, 1000)


@pytest.mark.parametrize("entry", zoo.TOKENIZERS, ids=lambda entry: entry.name)
def test_every_tokenizer_builds_with_exactly_its_parameters(entry: zoo.TokenizerEntry):
    module, config_class = KINDS[entry.kind]
    config = config_class(ch_mult=(1, 2, 2, 4)) if entry.name == "VQ-8" else config_class()
    with torch.device("meta"):
        tokenizer = module(config)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == entry.params
    assert tokenizer.vocab_size == entry.vocab_size
    assert tokenizer.image_shape[1] // tokenizer.grid[0] == entry.downsampling
    assert tokenizer.codebook_VE.shape == (entry.vocab_size, entry.code_dim)


def test_the_table_is_consistent():
    assert {entry.family for entry in zoo.ENTRIES} == set(FAMILIES)
    assert len(set(NAMES)) == len(NAMES) == 22
    assert len({entry.file for entry in zoo.ENTRIES}) == len(NAMES)
    tokenizers = {entry.name: entry for entry in zoo.TOKENIZERS}
    for entry in zoo.ENTRIES:
        tokenizer = tokenizers[entry.tokenizer]
        assert entry.vocab_size == tokenizer.vocab_size
        side = entry.grid[0] if entry.grid else entry.scales[-1] if entry.scales else None
        assert side is not None and side * tokenizer.downsampling == entry.resolution


def test_sampling_settings_are_those_of_our_sampler():
    known = {field.name for field in fields(Sampler)}
    for entry in zoo.ENTRIES:
        assert set(entry.sampling) <= known
        Sampler(**{name: value for name, value in entry.sampling.items() if value is not None})
    assert zoo.entry("VAR-d16").sampling["guidance"] == 2.5, "official cfg 1.5"
    assert zoo.entry("LlamaGen-L-256").sampling["guidance"] is None, "not stated"


@pytest.mark.parametrize("family", FAMILIES)
def test_published_plans_can_be_made(family: str):
    """Steps and schedule of the table are those that the family's `plan` knows."""
    entry = next(entry for entry in zoo.ENTRIES if entry.family == family)
    model = build(family, {**entry.config, "num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 16})
    order_BL = torch.arange(entry.codes).unsqueeze(0)
    plan = model.plan(1, steps=entry.sampling["steps"], schedule=entry.sampling["step_schedule"], order_BL=order_BL)
    assert sum(plan.sizes) == entry.codes
    assert entry.sampling["steps"] in (None, len(plan.sizes))


def test_names():
    assert zoo.entry("llamagen-l-256").name == "LlamaGen-L-256"
    with pytest.raises(VarkdError, match="did you mean 'VAR-d16'"):
        zoo.entry("VAR-16")


@pytest.mark.parametrize("options", [[], ["--tokenizers"]])
def test_the_table_can_be_read(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", *options]) == 0
    text = capsys.readouterr().out
    rows = zoo.TOKENIZERS if options else zoo.ENTRIES
    assert all(len(line) <= 120 for line in text.splitlines())
    for row in rows:
        assert any(line.startswith(f"{row.name} ") and line.endswith(row.file) for line in text.splitlines())


def test_the_table_for_programs(capsys: pytest.CaptureFixture[str]):
    assert main(["zoo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = {"name", "family", "params", "codes", "resolution", "tokenizer", "file", "container", "license", "fid",
              "sampling"}  # fmt: skip
    assert [row["name"] for row in rows] == NAMES and all(wanted <= set(row) for row in rows)
    assert rows[0]["sampling"]["guidance"] is None
    assert main(["zoo", "--json", "--tokenizers"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [row.name for row in zoo.TOKENIZERS]


def test_the_table_needs_no_torch():
    heavy = "[name for name in ('torch', 'numpy') if name in sys.modules]"
    code = f"import sys\nfrom varkd.cli import main\nmain(['zoo'])\nprint('HEAVY', *{heavy}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split() == ["HEAVY"] and "VAR-d36" in done.stdout
