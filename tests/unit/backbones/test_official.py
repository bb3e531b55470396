"""Official files in and out: the same weights and the same predictions, nothing guessed, every tensor accounted for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import varkd
from varkd.backbones import zoo
from varkd.backbones.official import blank_model, convert, recognize
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build, family_class, load_backbone, save_backbone, weights_hash
from varkd.cli import main, parser
from varkd.containers import read_state
from varkd.errors import VarkdError
from varkd.run.official import load_official
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig
from varkd.types import Condition
from varkd.verify import verify
from varkd.world import Rng

GOLDEN = Path(__file__).parents[2] / "golden"
BODY = {"vocab_size": 12, "num_classes": 3, "num_layers": 4, "dim": 16, "num_heads": 2, "ffn_dim": 24}
LAYOUTS: dict[str, dict[str, Any]] = {family: {"grid": (4, 4)} for family in FAMILIES} | {
    "var": {"scales": (1, 2, 4), "code_dim": 16}
}
HELP: dict[str, dict[str, Any]] = {  # what shapes do not tell
    "llamagen": {"heads": 2, "grid": (4, 4)},
    "arpg": {"heads": 2, "grid": (4, 4)},
    "randar": {"heads": 2, "grid": (4, 4)},
    "rar": {"grid": (4, 4)},
    "var": {},
}
SUFFIX = {"randar": ".safetensors", "var": ".pth", "rar": ".bin"}
KEY = {"llamagen": "model", "arpg": "state_dict"}


@pytest.fixture(scope="module")
def tokenizers() -> Mapping[str, Tokenizer]:
    torch.manual_seed(0)
    grid = VQ(VQConfig.small(8, 1, 12, 2)).eval()
    return dict.fromkeys(FAMILIES, grid) | {"var": MultiScale(MultiScaleConfig.small(8, 1, 12, 2)).eval()}


def random_model(family: str, tokenizer: Tokenizer) -> Backbone:
    model = build(family, {**BODY, **LAYOUTS[family]}, quantizer=tokenizer.quantizer).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tokenizers: Mapping[str, Tokenizer]) -> Backbone:
    return random_model(request.param, tokenizers[request.param])


@pytest.fixture
def folders(tmp_path: Path, model: Backbone, tokenizers: Mapping[str, Tokenizer]) -> tuple[Path, Path]:
    """The model and its tokenizer on disk."""
    tokenizer = tokenizers[model.family]
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_backbone(model, tmp_path / "model", tokenizer.hash)
    return tmp_path / "model", tmp_path / "tokenizer"


@torch.no_grad()
def logits(model: Backbone, label: int = 1) -> Tensor:
    codes_BL = torch.arange(2 * model.sequence_length).reshape(2, -1) * 7 % model.vocab_size
    plan = model.plan(2, Rng(0), torch.arange(2))
    return model.head(model(codes_BL, Condition(torch.tensor([0, label])), plan))


def flags(family: str) -> list[str]:
    given = []
    for name, value in HELP[family].items():
        given += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return given


def test_every_family_is_here():
    assert set(HELP) == set(FAMILIES)


def test_round_trip_by_command(
    tmp_path: Path, model: Backbone, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    folder, tokenizer = folders
    file, out = tmp_path / f"official{SUFFIX.get(model.family, '.pt')}", tmp_path / "again"
    assert main(["export", str(folder), "--official", "--out", str(file)]) == 0
    container = read_state(file)
    assert container.layout == KEY.get(model.family, "raw") and container.notes == []
    assert set(container.state) == set(model.official_state())
    command = ["convert", str(file), "--family", model.family, "--out", str(out), "--tokenizer", str(tokenizer)]
    capsys.readouterr()
    assert main([*command, *flags(model.family)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(out) and any("tensors used" in line for line in said)
    again, info = load_backbone(out)
    assert weights_hash(again) == weights_hash(model)
    assert torch.equal(logits(again), logits(model))
    assert info == json.loads((folder / "config.json").read_text())


def test_round_trip_in_the_library(tmp_path: Path, model: Backbone, folders: tuple[Path, Path]):
    folder, tokenizer = folders
    file = tmp_path / "weights.safetensors"
    varkd.export(folder, file, official=True)
    needed = tokenizer if model.family == "var" else None
    again = varkd.load_official(file, device="cpu", tokenizer=needed, **HELP[model.family])
    assert again.family == model.family and not again.training and weights_hash(again) == weights_hash(model)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    varkd.export(folder, tmp_path / "copy")
    assert weights_hash(varkd.load(tmp_path / "copy", "cpu")) == weights_hash(model)


def test_half_precision_weights_become_float32(model: Backbone, tokenizers: Mapping[str, Tokenizer]):
    quantizer = tokenizers[model.family].quantizer
    for dtype in (torch.float16, torch.bfloat16):
        state = {name: value.to(dtype) for name, value in model.official_state().items()}
        again, _ = convert(state, **HELP[model.family], quantizer=quantizer)
        name = model.class_rows(model.config)[0]
        assert torch.equal(again.state_dict()[name], model.state_dict()[name].to(dtype).float())
        assert {value.dtype for value in again.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_upstream_state_dicts(family: str):
    """The golden files hold state dicts that the upstream code made."""
    (path,) = GOLDEN.glob(f"{family}-*.safetensors")
    tensors, config = load_file(path), json.loads(path.with_suffix(".json").read_text())["config"]
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    heads = config.get("n_head") or config.get("num_heads") or config.get("num_attention_heads")
    options: dict[str, Any] = {"grid": (config["grid"],) * 2} if "grid" in config else {}
    if family == "var":
        resi = "vq_state.quantize.quant_resi.qresi_ls"
        options["quantizer"] = {
            "codebook": tensors["vq_state.quantize.embedding.weight"],
            "phi.weight": torch.stack([tensors[f"{resi}.{index}.weight"] for index in range(4)]),
            "phi.bias": torch.stack([tensors[f"{resi}.{index}.bias"] for index in range(4)]),
        }
    found, report = convert(state, heads=heads, **options)
    assert found.family == family == recognize(state)
    assert sorted(report.used + report.dropped) == sorted(state)
    for name in report.used:
        assert torch.equal(found.state_dict()[name], state[name]), name
    if family == "var":
        assert found.config.scales == tuple(config["patch_nums"]), "read from lvl_1L"
        for name, value in found.official_state().items():
            assert torch.equal(value.float(), state[name].float()), name


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_published_models_need_no_help(entry: zoo.Entry):
    """The official file name, or the name in the zoo, tells what shapes do not."""
    model_class = family_class(entry.family)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**entry.config))
    hints: list[dict[str, Any]] = [{"file_name": entry.file}, {"model": entry.name.upper()}]
    for hint in hints:
        again, _ = blank_model(model.official_state(), entry.family, **hint)
        assert again.config == model.config


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("shapes-*.json")), ids=lambda path: path.stem)
def test_names_and_shapes_are_the_official_ones(path: Path, tmp_path: Path):
    checks = verify(path)
    assert len(checks) >= 6 and all(check.passed for check in checks)
    info = json.loads(path.read_text())
    first = next(iter(info["models"].values()))
    for changes in ({"n_parameters": 1}, {"keys": {**first["keys"], "extra.{i}.weight": [[2], 3]}}):
        info["models"] = {"changed": {**first, **changes}}
        (tmp_path / "shapes.json").write_text(json.dumps(info))
        assert sum(not check.passed for check in verify(tmp_path / "shapes.json")) == 1


def meta_state(name: str, **changes: Any) -> dict[str, Tensor]:
    entry = zoo.entry(name)
    model_class = family_class(entry.family)
    with torch.device("meta"):
        return model_class(model_class.config_class(**{**entry.config, **changes})).official_state()


def test_shapes_that_only_one_published_size_has():
    model, notes = blank_model(meta_state("LlamaGen-3B-384"), "llamagen")
    assert (model.config.num_heads, model.config.grid) == (32, (24, 24))
    assert notes == ["grid 24 24, as in LlamaGen-3B-384", "num_heads 32, as in LlamaGen-3B-384"]


def test_what_is_not_determined_is_asked_for():
    state = meta_state("LlamaGen-L-256")
    with pytest.raises(VarkdError, match=r"LlamaGen-L-256 and LlamaGen-L-384 .*--model or --grid ROWS COLUMNS$"):
        blank_model(state, "llamagen")
    model, _ = blank_model(state, "llamagen", grid=(16, 16))
    assert model.config.num_heads == 16, "both published models agree"
    with pytest.raises(VarkdError, match="give --grid ROWS COLUMNS and --heads H"):
        blank_model(meta_state("LlamaGen-L-256", num_layers=3), "llamagen", file_name="c2i_L_256.pt")
    with pytest.raises(VarkdError, match="--grid"):
        blank_model(meta_state("RAR-B", num_layers=2), "rar")
    with pytest.raises(VarkdError, match="--scales"):
        blank_model(meta_state("VAR-d16", num_layers=2), "var")


def test_a_given_grid_outweighs_the_zoo():
    """Fine-tuned at another resolution: the caller knows."""
    model, notes = blank_model(meta_state("LlamaGen-XL-384"), "llamagen", grid=(16, 16), model="LlamaGen-XL-384")
    assert model.config.grid == (16, 16) and notes == ["num_heads 20, as in LlamaGen-XL-384"]


def test_arguments_that_contradict_the_weights():
    with pytest.raises(VarkdError, match="--heads 8 contradicts the weights, which say 16"):
        blank_model(meta_state("VAR-d16"), "var", heads=8)
    with pytest.raises(VarkdError, match="var models have no grid"):
        blank_model(meta_state("VAR-d16"), "var", grid=(16, 16))
    with pytest.raises(VarkdError, match="llamagen models have no scales"):
        blank_model(meta_state("LlamaGen-B-256"), "llamagen", scales=(1, 2))
    with pytest.raises(VarkdError, match=r"not those of LlamaGen-B-256: these are the shapes of LlamaGen-L-256, Ll"):
        blank_model(meta_state("LlamaGen-L-256"), "llamagen", model="LlamaGen-B-256")
    with pytest.raises(VarkdError, match="not those of RAR-B"):
        blank_model(meta_state("LlamaGen-L-256"), "llamagen", model="RAR-B")
    with pytest.raises(VarkdError, match="num_heads 3"):
        blank_model(meta_state("LlamaGen-L-256"), "llamagen", heads=3, grid=(16, 16))


def small(family: str, tokenizers: Mapping[str, Tokenizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = {name: value.clone() for name, value in random_model(family, tokenizers[family]).official_state().items()}
    return state, {**HELP[family], "quantizer": tokenizers[family].quantizer}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_missing_unexpected_or_of_another_shape(family: str, tokenizers: Mapping[str, Tokenizer]):
    state, options = small(family, tokenizers)
    name = next(name for name in reversed(state) if name.endswith("weight") and ".1." in name)
    with pytest.raises(VarkdError, match=f"1 missing: {name}"):
        convert({key: value for key, value in state.items() if key != name}, family, **options)
    with pytest.raises(VarkdError, match="1 unexpected: extra"):
        convert({**state, "extra": torch.ones(1)}, family, **options)
    with pytest.raises(VarkdError, match=rf"1 of another shape: {name} \(5,\) instead of"):
        convert({**state, name: torch.ones(5)}, family, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_shapes_are_one_line(family: str, tokenizers: Mapping[str, Tokenizer]):
    """Whatever tensor has other axes: `VarkdError`, no traceback of an unpacking."""
    state, options = small(family, tokenizers)
    for name in state:
        for wrong in (torch.ones(()), torch.ones(0, 0)):
            try:
                convert({**state, name: wrong}, family, **options)
            except VarkdError as error:
                assert "\n" not in str(error)
            else:
                assert name not in random_model(family, tokenizers[family]).state_dict(), name


def test_recomputed_tensors_are_dropped_on_purpose(tokenizers: Mapping[str, Tokenizer]):
    state, options = small("llamagen", tokenizers)
    model, report = convert({**state, "freqs_cis": torch.ones(3)}, "llamagen", **options)
    assert report.dropped == ("freqs_cis",) and "1 dropped (freqs_cis)" in report.lines()[0]
    state, options = small("var", tokenizers)
    without = {name: value for name, value in state.items() if name not in ("lvl_1L", "attn_bias_for_masking")}
    with pytest.raises(VarkdError, match="--scales"):
        convert(without, "var", **options)
    with pytest.raises(VarkdError, match="contradicts"):
        convert(state, "var", scales=(1, 2, 3), **options)
    model, _ = convert(without, "var", scales=(1, 2, 4), **options)
    assert model.config.scales == (1, 2, 4)
    for levels in (-torch.ones(1, 21), torch.ones(1, 21) * 3, torch.zeros(1, 0)):
        with pytest.raises(VarkdError):
            convert({**state, "lvl_1L": levels}, "var", **options)


def test_a_var_needs_its_tokenizer(tokenizers: Mapping[str, Tokenizer]):
    state, options = small("var", tokenizers)
    with pytest.raises(VarkdError, match="give --tokenizer DIR"):
        convert(state, "var", **{**options, "quantizer": None})


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_classes(family: str, tokenizers: Mapping[str, Tokenizer]):
    state, options = small(family, tokenizers)
    old = random_model(family, tokenizers[family])
    for count in (1, 3, 7):
        model, report = convert(state, family, num_classes=count, **options)
        again, _ = convert(state, family, num_classes=count, **options)
        assert model.num_classes == count and weights_hash(model) == weights_hash(again)
        # The unconditional model, which depends on every other row and weight, is the same.
        assert torch.equal(logits(model, model.null_label)[1], logits(old, old.null_label)[1])
        (name, first), table = old.class_rows(old.config), old.state_dict()[old.class_rows(old.config)[0]]
        new = model.state_dict()[name]
        assert torch.equal(new[:first], table[:first]) and torch.equal(new[first + count :], table[first + 3 :])
        if count != 3:
            assert not torch.equal(new[first], table[first]) and any("3 classes" in line for line in report.lines())
            other, _ = convert(state, family, num_classes=count, seed=1, **options)
            assert weights_hash(other) != weights_hash(model)
        else:
            assert weights_hash(model) == weights_hash(old), "as many classes: nothing is drawn"
    with pytest.raises(VarkdError, match="at least 1"):
        convert(state, family, num_classes=0, **options)


def test_new_classes_have_the_spread_of_the_old():
    config = {**BODY, "num_classes": 500, "grid": (2, 2)}
    state = build("llamagen", config).official_state()
    state["cls_embedding.embedding_table.weight"] = torch.randn(501, 16) * 3
    model, _ = convert(state, "llamagen", heads=2, grid=(2, 2), num_classes=400)
    assert model.state_dict()["cls_embedding.embedding_table.weight"][:400].std() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slot_embeddings.weight", "Hita"),
        ("encoder_pos_embed_learned", "xAR"),
        ("cls_embedding.uncond_embedding", "text-conditional"),
        ("quantize.embedding.weight", "varkd tokenizer import"),
        ("some.weight", "no family that varkd knows"),
    ],
)
def test_what_is_not_supported_is_named(name: str, words: str):
    state = {"tok_embeddings.weight": torch.ones(2, 2), name: torch.ones(2, 2)}
    with pytest.raises(VarkdError, match=words):
        recognize(state)
    with pytest.raises(VarkdError, match=words):
        convert(state)
    with pytest.raises(VarkdError, match=words):
        convert(state, "llamagen")


def test_the_wrong_family(tokenizers: Mapping[str, Tokenizer]):
    for family in FAMILIES:
        state, options = small(family, tokenizers)
        for other in FAMILIES:
            if other != family:
                with pytest.raises(VarkdError, match=f"--family {family}|have no"):
                    convert(state, other, **options)
    with pytest.raises(VarkdError, match="did you mean 'llamagen'"):
        convert({}, "llamagan")


def test_weights_are_copies(tokenizers: Mapping[str, Tokenizer]):
    """A file mapped from disk may change under us, and tensors may share storage."""
    state, options = small("llamagen", tokenizers)
    state["norm.weight"] = state["layers.0.ffn_norm.weight"]
    model, _ = convert(state, "llamagen", **options)
    before = weights_hash(model)
    for value in state.values():
        value.zero_()
    assert weights_hash(model) == before


def refused(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    assert main(list(map(str, command))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("varkd: error: ")
    return line


@pytest.mark.parametrize("family", ["llamagen"])
def test_bad_use_of_the_commands(
    family: str, tmp_path: Path, tokenizers: Mapping[str, Tokenizer], capsys: pytest.CaptureFixture[str]
):
    save_backbone(random_model(family, tokenizers[family]), tmp_path / "model")
    file, out = tmp_path / "a.pt", tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--official", "--out", str(file)]) == 0
    capsys.readouterr()
    assert "--heads" in refused(capsys, "convert", file, "--out", out)
    assert "one or two sides" in refused(capsys, "convert", file, "--out", out, "--heads", 2, "--grid", 1, 2, 3)
    assert "no such file" in refused(capsys, "convert", tmp_path / "none.pt", "--out", out)
    assert "no published model" in refused(capsys, "convert", file, "--out", out, "--model", "GPT-L")
    given = ["--heads", 2, "--grid", 4]
    assert "no tokenizer in" in refused(capsys, "convert", file, "--out", out, *given, "--tokenizer", tmp_path)
    save_tokenizer(VQ(VQConfig.small(16, 1, 12, 2)), tmp_path / "other")
    tokenizer = tmp_path / "other"
    assert "grid (8, 8)" in refused(capsys, "convert", file, "--out", out, *given, "--tokenizer", tokenizer)
    save_tokenizer(tokenizers["var"], tmp_path / "scales")
    tokenizer = tmp_path / "scales"
    assert "scales (1, 2, 4)" in refused(capsys, "convert", file, "--out", out, *given, "--tokenizer", tokenizer)
    assert not out.exists()
    assert "not empty" in refused(capsys, "convert", file, "--out", tmp_path / "model", *given)
    assert "exists" in refused(capsys, "export", tmp_path / "model", "--official", "--out", file)
    assert ".safetensors" in refused(capsys, "export", tmp_path / "model", "--official", "--out", tmp_path / "b.npz")
    assert "not empty" in refused(capsys, "export", tmp_path / "model", "--out", tmp_path / "model")
    assert "no model at" in refused(capsys, "export", tmp_path / "none", "--out", tmp_path / "c")
    out.mkdir()
    assert main(["convert", str(file), "--out", str(out), *map(str, given)]) == 0, "an empty folder will do"


def test_randar_reads_safetensors_only(
    tmp_path: Path, tokenizers: Mapping[str, Tokenizer], capsys: pytest.CaptureFixture[str]
):
    save_backbone(random_model("randar", tokenizers["randar"]), tmp_path / "model")
    assert "safetensors" in refused(capsys, "export", tmp_path / "model", "--official", "--out", tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written"


def test_the_commands_of_the_guide_parse_and_its_models_exist():
    text = (GOLDEN.parents[1] / "docs" / "backbones.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("varkd ") and "--out" in line]
    assert len(commands) >= 8
    for command in commands:
        parser().parse_args(shlex.split(command)[1:])
    files = {entry.file for entry in (*zoo.ENTRIES, *zoo.TOKENIZERS)}
    assert {command.split()[2] for command in commands if command.startswith("varkd convert")} <= files


def test_other_numbers_of_convolutions(tmp_path: Path):
    """The tokenizer says how many there are: no file of a VAR does."""
    config = replace(MultiScaleConfig.small(8, 1, 12, 2), num_phi=2)
    tokenizer = MultiScale(config).eval()
    model = build("var", {**BODY, **LAYOUTS["var"], "num_phi": 2}, quantizer=tokenizer.quantizer)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    save_backbone(model, tmp_path / "model")
    varkd.export(tmp_path / "model", tmp_path / "var.pth", official=True)
    again = load_official(tmp_path / "var.pth", tokenizer=tmp_path / "tokenizer", device="cpu")
    assert weights_hash(again) == weights_hash(model)
