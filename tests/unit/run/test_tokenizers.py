"""`varkd tokenizer fit` and `import`: from images or an official file to a folder that `varkd encode` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from varkd.cli import main
from varkd.data.codes import CodeDataset, read_manifest
from varkd.run.data import Codes, fit
from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.store import load_tokenizer
from varkd.tokenizers.vq import VQ

FIT = ["tokenizer", "fit", "digits", "--device", "cpu", "--downsampling", "2", "--codes", "64", "--steps", "2"]


def run(*command: object) -> int:
    return main([str(part) for part in command])


def test_multiscale_from_images_to_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(*FIT, "--kind", "multiscale", "--scales", 1, 3, 4, "--out", tmp_path / "t") == 0
    assert "dB on 180 held-out images" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "t")
    assert isinstance(tokenizer, MultiScale) and tokenizer.scales == (1, 3, 4) and tokenizer.vocab_size == 64
    assert json.loads((tmp_path / "t" / "fit.json").read_text())["fit"]["steps"] == 2
    encode = ["encode", "digits", "--tokenizer", tmp_path / "t", "--out", tmp_path / "codes", "--device", "cpu"]
    assert run(*encode) == 0
    manifest = read_manifest(tmp_path / "codes")
    assert manifest["scales"] == [1, 3, 4] and manifest["tokenizer"]["kind"] == "multiscale"
    codes = CodeDataset(tmp_path / "codes", "validation")
    assert codes.sequence_length == 26 and Codes(tmp_path / "codes").layout.scales == (1, 3, 4)
    assert Codes(tmp_path / "codes").tokenizer.hash == tokenizer.hash
    assert (tmp_path / "codes" / "reconstruction.png").is_file()


def test_multiscale_scales_double_by_default(tmp_path: Path):
    record = fit("digits", tmp_path / "t", kind="multiscale", vocab_size=16, downsampling=1, steps=1, quiet=True)
    assert load_tokenizer(tmp_path / "t").scales == (1, 2, 4, 8) and record["num"] == 180


def test_vq_is_the_default(tmp_path: Path):
    assert run(*FIT, "--out", tmp_path / "t") == 0
    assert isinstance(load_tokenizer(tmp_path / "t"), VQ)


@pytest.mark.parametrize("kind", [None, "maskgit"])
def test_import_of_maskgit(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str | None):
    tokenizer = MaskGIT(MaskGITConfig(8, ch=32, ch_mult=(1, 2), z_channels=4, num_res_blocks=1, vocab_size=32))
    torch.save(tokenizer.state_dict(), tmp_path / "maskgit.bin")
    command = ["tokenizer", "import", tmp_path / "maskgit.bin", "--out", tmp_path / "t", "--image-size", 8]
    assert run(*command, *(["--kind", kind] if kind else [])) == 0
    assert "maskgit: 32 codes on a 4x4 grid" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "t").hash == tokenizer.hash


def test_import_of_multiscale(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = MultiScaleConfig(8, ch=32, ch_mult=(1, 2), z_channels=4, num_res_blocks=1, decoder_res_blocks=1,
                              vocab_size=32, scales=(1, 4))  # fmt: skip
    torch.save({"trainer": {"vae_local": MultiScale(config).state_dict()}}, tmp_path / "ar-ckpt-last.pth")
    command = ["tokenizer", "import", tmp_path / "ar-ckpt-last.pth", "--out", tmp_path / "t", "--image-size", 8]
    assert run(*command) == 2
    assert "give the sides of its 2 maps" in capsys.readouterr().err
    assert run(*command, "--scales", 1, 4) == 0
    assert "multiscale: 32 codes on maps of 1x1, 4x4" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "t").config == config
    assert run(*command, "--scales", 1, 4) == 2
    assert "already holds a tokenizer" in capsys.readouterr().err
    assert run(*command, "--scales", 1, 4, "--overwrite") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scales", 1, 4], "--scales is for --kind multiscale"),
        (["--kind", "multiscale", "--scales", 1, 2, 8], "scales must rise to image_size / downsampling = 4"),
        (["--kind", "multiscale", "--scales", 4, 2], "scales must rise"),
        (["--kind", "multiscale", "--downsampling", 3], "downsampling must be a power of 2"),
        (["--kind", "multiscale", "--codes", 0], "vocab_size must be at least 1"),
        (["--kind", "multiscale", "--image-size", 9], "downsampling = 4.5"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list, words: str):
    assert run(*FIT, "--out", tmp_path / "t", *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()
