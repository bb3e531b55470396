"""Every mistake that a user can make: exit code 2, one line that says what to do, nothing half-written."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import SIZES, arguments, train

from varkd.cli import main
from varkd.tokenizers.store import save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's copies of parquet files out of the user's cache."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused by one line holding all `words`; `untouched` must be as it was."""

    def run(command: list[object], *words: str, untouched: Path | None = None) -> str:
        before = snapshot(untouched) if untouched else {}
        capfd.readouterr()
        code = main([str(part) for part in command])
        captured = capfd.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured
        assert len(lines) == 1 and lines[0].startswith("varkd: error: "), captured.err
        assert captured.out == ""
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        if untouched:
            assert snapshot(untouched) == before
        return lines[0]

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def folder_of(root: Path, num: int = 6, **options) -> Path:
    """`num` pictures in each of two classes."""
    for name in ("a", "b"):
        for index in range(num):
            picture(root / name / f"{index}.png", seed=index, **options)
    return root


def parquet(path: Path, labels: list[int], classes: int | None = None, size: int = 8) -> Path:
    import datasets

    def encoded(seed: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    kind = datasets.Value("int64") if classes is None else datasets.ClassLabel(num_classes=classes)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def encode(data: object, out: Path, tokenizer: object = "pixels") -> list[object]:
    return ["encode", data, "--tokenizer", tokenizer, "--out", out, "--device", "cpu"]


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path, refused: Refused):
    refused(encode(tmp_path / "none", tmp_path / "codes"), "no such folder or file", untouched=tmp_path)


def test_an_empty_folder(tmp_path: Path, refused: Refused):
    (tmp_path / "images").mkdir()
    refused(encode(tmp_path / "images", tmp_path / "codes"), "no images in", "one folder for each class", untouched=tmp_path)


def test_a_folder_with_one_image(tmp_path: Path, refused: Refused):
    picture(tmp_path / "images" / "a" / "0.png")
    refused(encode(tmp_path / "images", tmp_path / "codes"), "one image", untouched=tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no picture", None], ids=["empty", "text", "truncated"])
def test_a_corrupt_image(tmp_path: Path, refused: Refused, content: bytes | None):
    bad = folder_of(tmp_path / "images") / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-40] if content is None else content)
    line = refused(encode(tmp_path / "images", tmp_path / "codes"), str(bad))
    assert "corrupt" in line or "truncated" in line
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mode": "RGB"}, ["grey images", "3 channels"]), ({"size": (9, 8)}, ["1x8x9", "image_size"])],
    ids=["colour", "size"],
)
def test_images_that_the_tokenizer_does_not_take(tmp_path: Path, refused: Refused, options: dict, words: list[str]):
    data = folder_of(tmp_path / "images", **options)
    tokenizer = "pixels" if "mode" in options else pixels_8x8(tmp_path / "tokenizer")
    refused(encode(data, tmp_path / "codes", tokenizer), *words, untouched=tmp_path)


def pixels_8x8(folder: Path) -> Path:
    from varkd.tokenizers.pixels import Pixels, PixelsConfig

    save_tokenizer(Pixels(PixelsConfig(height=8, width=8)), folder)
    return folder


def test_images_of_different_sizes(tmp_path: Path, refused: Refused):
    data = folder_of(tmp_path / "images")
    picture(data / "b" / "5.png", size=(8, 10))
    refused(encode(data, tmp_path / "codes"), "8x10", "8x8", str(data / "b" / "5.png"))
    assert not (tmp_path / "codes" / "manifest.json").exists()


@pytest.mark.parametrize("cut", [0, 10, 400])
def test_a_truncated_parquet_file(tmp_path: Path, refused: Refused, cut: int):
    path = parquet(tmp_path / "a.parquet", [0, 1] * 8)
    path.write_bytes(path.read_bytes()[:cut] if cut < 400 else path.read_bytes()[:-cut])
    refused(encode(path, tmp_path / "codes"), str(path), untouched=tmp_path)


def test_a_missing_parquet_file(tmp_path: Path, refused: Refused):
    refused(encode(tmp_path / "a.parquet", tmp_path / "codes"), "no such file", untouched=tmp_path)


@pytest.mark.parametrize(("labels", "classes"), [([0, -3] * 6, None), ([0, 1, 7] * 4, 3)], ids=["negative", "large"])
def test_a_label_out_of_range(tmp_path: Path, refused: Refused, labels: list[int], classes: int | None):
    import pyarrow.parquet

    path = parquet(tmp_path / "a.parquet", [label % 3 for label in labels] if classes else labels, classes)
    if classes:  # the library does not write such a file: change the numbers below its schema
        table = pyarrow.parquet.read_table(path)
        column = table.schema.get_field_index("label")
        table = table.set_column(column, table.schema.field("label"), pyarrow.array(labels, pyarrow.int64()))
        pyarrow.parquet.write_table(table, path)
    refused(encode(path, tmp_path / "codes"), "label", untouched=tmp_path)


def test_an_interrupted_download(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def interrupted(*arguments: object, **options: object) -> None:
        raise ConnectionError("connection reset by peer\nwhile reading shard 3")

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    refused(encode("org/name", tmp_path / "codes"), "could not download org/name", "run it again", untouched=tmp_path)


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_codes(tmp_path: Path, codes: Path) -> Path:
    """A copy of the codes to damage."""
    return Path(shutil.copytree(codes, tmp_path / "codes"))


def test_codes_of_another_tokenizer(tmp_path: Path, codes: Path, refused: Refused):
    other = vq(tmp_path / "tokenizer")
    refused(arguments(tmp_path / "run", codes, f"tokenizer={other}"), "holds codes of tokenizer", "encode", untouched=tmp_path)


def test_a_tokenizer_that_was_changed(tmp_path: Path, own_codes: Path, refused: Refused):
    config = own_codes / "tokenizer" / "config.json"
    config.write_text(config.read_text().replace('"levels": 17', '"levels": 16'))
    assert '"levels": 16' in config.read_text()
    refused(arguments(tmp_path / "run", own_codes), "changed after it was saved", untouched=tmp_path)


@pytest.mark.parametrize("name", ["train-00000.npy", "train-00000-labels.npy", "validation-00000.npy"])
def test_a_truncated_shard(tmp_path: Path, own_codes: Path, refused: Refused, name: str):
    (own_codes / name).write_bytes((own_codes / name).read_bytes()[:-64])
    refused(arguments(tmp_path / "run", own_codes), name, "varkd encode", untouched=tmp_path)


def test_a_missing_shard(tmp_path: Path, own_codes: Path, refused: Refused):
    (own_codes / "train-00000.npy").unlink()
    refused(arguments(tmp_path / "run", own_codes), "is missing", "varkd encode", untouched=tmp_path)


def test_a_label_without_a_class_in_the_codes(tmp_path: Path, own_codes: Path, refused: Refused):
    label_N = np.load(own_codes / "train-00000-labels.npy")
    label_N[3] = 10
    np.save(own_codes / "train-00000-labels.npy", label_N)
    refused(arguments(tmp_path / "run", own_codes), "label 10", "10 classes", untouched=tmp_path)


def test_a_code_outside_the_codebook(tmp_path: Path, own_codes: Path, refused: Refused):
    codes_NvL = np.load(own_codes / "train-00000.npy")
    codes_NvL[:] = 17
    np.save(own_codes / "train-00000.npy", codes_NvL)
    refused(arguments(tmp_path / "run", own_codes), "code 17", "encode again", untouched=own_codes)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "varkd-codes", "version": 9}',
                                     '{"format": "varkd-codes", "version": 1}'])  # fmt: skip
def test_a_damaged_manifest(tmp_path: Path, own_codes: Path, refused: Refused, content: str):
    (own_codes / "manifest.json").write_text(content)
    refused(arguments(tmp_path / "run", own_codes), str(own_codes), untouched=tmp_path)


def test_data_that_is_nothing(tmp_path: Path, refused: Refused):
    refused(arguments(tmp_path / "run", tmp_path / "none"), "not a codes folder", "varkd encode", untouched=tmp_path)
    refused(["train", "digits-student", f"out={tmp_path / 'run'}"], "give data=", untouched=tmp_path)
    refused(["train", "digits-student", f"data={tmp_path}"], "give out=", untouched=tmp_path)


# --- models ----------------------------------------------------------------------------------------------------------


def vq(folder: Path, vocab_size: int = 32, size: int = 8) -> Path:
    """An untrained tokenizer of grey images: as many codes as are asked for."""
    torch.manual_seed(0)
    save_tokenizer(VQ(VQConfig.small(size, 1, vocab_size, 4)), folder)
    return folder


def exported(folder: Path, **changes: object) -> Path:
    """An exported model for the digit codes, apart from `changes` in its sizes."""
    from varkd.backbones.store import build, save_backbone

    sizes = {"vocab_size": 17, "num_classes": 10, "grid": (8, 8), "num_layers": 1, "dim": 16, "num_heads": 1, "ffn_dim": 16}
    save_backbone(build("llamagen", sizes | changes), folder)
    return folder


@pytest.mark.parametrize("role", ["teacher", "init"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [({"vocab_size": 32}, ["32 codes", "17"]), ({"num_classes": 7}, ["7 classes", "10"]), ({"grid": (4, 4)}, ["16", "64"])],
    ids=["codes", "classes", "grid"],
)
def test_a_model_of_other_data(
    tmp_path: Path, codes: Path, refused: Refused, role: str, changes: dict, words: list[str]
):
    model = exported(tmp_path / "model", **changes)
    command = arguments(tmp_path / "run", codes, "method=kd" if role == "teacher" else "method=ce", f"{role}={model}")
    refused(command, *words, untouched=tmp_path)


@pytest.mark.parametrize("role", ["teacher", "init"])
def test_a_model_of_another_tokenizer(tmp_path: Path, codes: Path, teacher: Path, refused: Refused, role: str):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    info = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**info, "tokenizer_hash": "f" * 64}))
    refused(arguments(tmp_path / "run", codes, f"{role}={model}"), "ffffffffffff", "tokenizer", untouched=tmp_path)


def test_weights_that_do_not_fit_their_config(tmp_path: Path, codes: Path, refused: Refused):
    model = exported(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    save_file({**state, "norm.weight": torch.ones(5)}, model / "model.safetensors")
    refused(arguments(tmp_path / "run", codes, f"init={model}"), "norm.weight", "(5,)", untouched=tmp_path)
    state.pop("norm.weight")
    save_file(state, model / "model.safetensors")
    refused(arguments(tmp_path / "run", codes, f"init={model}"), "norm.weight", "missing", untouched=tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_teacher(tmp_path: Path, codes: Path, teacher: Path, refused: Refused, keep: int):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    (weights,) = model.glob("checkpoints/*/ema.safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(arguments(tmp_path / "run", codes, "method=kd", f"teacher={model}"), str(weights), untouched=tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"family": "llamagan"}', '{"family": "llamagen", "width": 3}', "{}"])
def test_a_damaged_config_of_a_model(tmp_path: Path, codes: Path, refused: Refused, content: str):
    model = exported(tmp_path / "model")
    (model / "config.json").write_text(content)
    refused(arguments(tmp_path / "run", codes, f"init={model}"), untouched=tmp_path)


def test_a_teacher_that_is_not_there(tmp_path: Path, codes: Path, refused: Refused):
    refused(arguments(tmp_path / "run", codes, "method=kd"), "needs a teacher", "teacher=RUN", untouched=tmp_path)
    refused(arguments(tmp_path / "run", codes, "teacher=none"), "no model at none", untouched=tmp_path)
    (tmp_path / "empty").mkdir()
    refused(arguments(tmp_path / "run", codes, f"teacher={tmp_path / 'empty'}"), "config.json", untouched=tmp_path)


def test_a_teacher_that_is_not_trained_yet(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    shutil.rmtree(model / "checkpoints")
    refused(arguments(tmp_path / "run", codes, f"teacher={model}"), "train it first", untouched=tmp_path)


def test_a_mistake_can_be_put_right_by_the_next_command(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    """A refused command has claimed no folder."""
    refused(arguments(tmp_path / "run", codes, "method=kd", "teacher=typo"), untouched=tmp_path)
    train(tmp_path / "run", codes, "method=kd", f"teacher={teacher}", "train.updates=1")


def test_a_mistake_does_not_cost_the_run_that_it_would_replace(tmp_path: Path, codes: Path, refused: Refused):
    train(tmp_path / "run", codes, "train.updates=1")
    refused([*arguments(tmp_path / "run", codes, "method=kd", "teacher=typo"), "--overwrite"], untouched=tmp_path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, refused: Refused):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name, write in (("zip.pt", torch.save), ("raw.pt", _raw_pickle)):
        write({"model": Hostile()}, tmp_path / name)
        command = ["tokenizer", "import", tmp_path / name, "--out", tmp_path / "tokenizer"]
        refused(command, name, "not a plain PyTorch file", untouched=tmp_path)
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "raw.pt").open("rb") as file:
        pickle.load(file)  # the trap is real
    assert (tmp_path / "ran").exists()


def _raw_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, refused: Refused, content: bytes):
    (tmp_path / "a.pt").write_bytes(content)
    refused(["tokenizer", "import", tmp_path / "a.pt", "--out", tmp_path / "t"], "a.pt", untouched=tmp_path)
    torch.save({"model": {"some.weight": torch.zeros(2)}}, tmp_path / "b.pt")
    refused(["tokenizer", "import", tmp_path / "b.pt", "--out", tmp_path / "t"], "b.pt", untouched=tmp_path)
    refused(["tokenizer", "import", tmp_path / "c.pt", "--out", tmp_path / "t"], "no such file", untouched=tmp_path)


# --- recipes and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.update=3"], ["unknown key 'train.update'", "did you mean 'updates'?"]),
        (["modle.dim=3"], ["unknown key 'modle'", "did you mean 'model'?"]),
        (["method=vrkd"], ["unknown method 'vrkd'", "did you mean 'varkd'?"]),
        (["method=varkd", "method.terms.studnet.weight=1"], ["unknown key", "anchor", "student"]),
        (["method=varkd", "method.terms.student.divergence=forward_kk"], ["forward_kk", "did you mean 'forward_kl'?"]),
        (["method=varkd", "method.terms.student.selection.quantile=1.5"], ["quantile", "[0, 1]"]),
        (["method=varkd", "method.terms.student.selection.quantile=-0.1"], ["quantile", "[0, 1]"]),
        (["method=varkd", "method.terms.student.selection.quantile=.nan"], ["quantile"]),
        (["method=varkd", "method.terms.student.space=full"], ["cluster_mass", "clusters"]),
        (["train.updates=many"], ["train.updates", "many"]),
        (["train.updates=0"], ["updates must be at least 1"]),
        (["train.updates=2.5"], ["train.updates", "2.5"]),
        (["train.precision=fp64"], ["train.precision", "fp64"]),
        (["train.micro_batches=3"], ["batch_size 8", "3 micro-batches"]),
        (["train.optim.lr=-1"], ["lr > 0"]),
        (["train.optim.lr=.nan"], ["lr"]),
        (["model.dim=15"], ["dim 15"]),
        (["model.num_heads=0"], ["num_heads"]),
        (["model.num_layers=0"], ["num_layers"]),
        (["model.dim=0"], ["dim"]),
        (["model.family=llamagan"], ["llamagan", "did you mean 'llamagen'?"]),
        (["device=tpu"], ["device=tpu"]),
        (["train.updates"], ["not key=value", "train.updates=500"]),
        (["train.updates=[1"], ["cannot read the value"]),
        (["train=3"], ["train"]),
        (["evaluation.sampler.temperature=-1"], ["temperature"]),
    ],
    ids=lambda value: " ".join(value[-1:]) if "=" in str(value) else "",
)
def test_settings_that_make_no_sense(
    tmp_path: Path, codes: Path, teacher: Path, refused: Refused, overrides: list[str], words: list[str]
):
    refused(arguments(tmp_path / "run", codes, f"teacher={teacher}", *overrides), *words, untouched=tmp_path)


def test_more_clusters_than_codes(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    command = arguments(tmp_path / "run", codes, "method=varkd", f"teacher={teacher}", "method.terms.student.space.count=18")
    refused(command, "18 clusters", "17 codes", untouched=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {updates: 3, lr: 1}", ["unknown key 'train.lr'"]),
        ("method: {preset: varkd, terms: {}}", ["terms"]),
        ("method: {preset: nothing}", ["unknown method 'nothing'"]),
        ("train: [1, 2]", ["train"]),
        ("train:", ["train"]),
        ("- 3", ["mapping"]),
        ("", ["mapping"]),
        ("a: [", ["not valid YAML"]),
        ("train: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_a_recipe_that_makes_no_sense(tmp_path: Path, codes: Path, refused: Refused, content: str, words: list[str]):
    (tmp_path / "recipe.yaml").write_text(content)
    recipe = str(tmp_path / "recipe.yaml")
    refused(["train", recipe, f"out={tmp_path / 'run'}", f"data={codes}", *SIZES], *words, untouched=tmp_path)


def test_an_unknown_recipe(tmp_path: Path, refused: Refused):
    refused(["train", "digit-teacher", f"out={tmp_path / 'run'}"], "did you mean 'digits-teacher'?", untouched=tmp_path)
    refused(["show", "nonsense"], "no recipe 'nonsense'", "digits-student")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_by_its_key(tmp_path: Path, codes: Path, refused: Refused):
    run = train(tmp_path / "run", codes, "train.updates=1")
    command = arguments(run, codes, "train.updates=1", "train.optim.lr=0.02", "seed=5")
    refused(command, "train.optim.lr: 0.01 -> 0.02", "seed: 0 -> 5", "--overwrite", untouched=run)
    (run / "mine.txt").write_text("notes")
    assert main([*command, "--overwrite"]) == 0
    assert (run / "mine.txt").read_text() == "notes", "only what varkd writes is replaced"
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 1]
    assert "lr: 0.02" in (run / "run.yaml").read_text()


def test_a_foreign_folder_is_left_alone(tmp_path: Path, codes: Path, refused: Refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for more in ([], ["--overwrite"]):
        refused([*arguments(tmp_path / "run", codes), *more], "not empty", "another out=", untouched=tmp_path)


def test_a_folder_below_a_file(tmp_path: Path, codes: Path, refused: Refused):
    (tmp_path / "file").write_text("")
    refused(arguments(tmp_path / "file" / "run", codes), "cannot write", untouched=tmp_path)
    refused(arguments(tmp_path / "file", codes), "file", untouched=tmp_path)
    refused(encode("digits", tmp_path / "file" / "codes"), "cannot write", untouched=tmp_path)


def test_another_teacher_at_the_same_path(tmp_path: Path, codes: Path, teacher: Path, refused: Refused):
    model = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    run = train(tmp_path / "run", codes, "method=kd", f"teacher={model}", "train.updates=1")
    (weights,) = model.glob("checkpoints/*/ema.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    command = arguments(run, codes, "method=kd", f"teacher={model}", "train.updates=1")
    refused(command, "begun with another teacher", untouched=run)


# --- using what is there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sample", "evaluate", "report"])
@pytest.mark.parametrize("what", ["missing", "empty", "codes", "file"])
def test_what_is_not_a_run(tmp_path: Path, codes: Path, refused: Refused, verb: str, what: str):
    place = codes if what == "codes" else tmp_path / what
    if what == "empty":
        place.mkdir()
    if what == "file":
        place.write_text("")
    more = [] if verb == "evaluate" else ["--out", tmp_path / "out"]
    refused([verb, place, *more], str(place), untouched=tmp_path)


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--num", "10"]])
def test_options_do_not_hide_what_is_not_a_run(tmp_path: Path, refused: Refused, options: list[str]):
    refused(["evaluate", tmp_path / "none", *options], "not a run folder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "3", "10"], ["label 10", "0..9"]),
        (["--labels", "-1"], ["label -1"]),
        (["--num", "0"], ["num=0"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-k", "-2"], ["top_k"]),
        (["--batch-size", "0"], ["batch"]),
        (["--device", "tpu"], ["device=tpu"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_sampling_what_cannot_be(tmp_path: Path, teacher: Path, refused: Refused, options: list[str], words: list[str]):
    refused(["sample", teacher, "--out", tmp_path / "out", *options], *words, untouched=tmp_path)


def test_evaluating_too_few(teacher: Path, refused: Refused):
    refused(["evaluate", teacher, "--num", "0"], "num_samples must be at least 1", untouched=teacher)


def test_a_run_that_is_not_finished(tmp_path: Path, codes: Path, refused: Refused):
    run = train(tmp_path / "run", codes, "train.updates=1")
    shutil.rmtree(run / "checkpoints")
    refused(["sample", run, "--out", tmp_path / "out"], "train it first", untouched=tmp_path)
