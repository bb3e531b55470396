"""Tokenizer folders and official files: what is saved comes back, what is damaged is refused in one line."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varkd.errors import VarkdError
from varkd.tokenizers.maskgit import MaskGIT, MaskGITConfig
from varkd.tokenizers.multiscale import MultiScale, MultiScaleConfig
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import Tokenizer
from varkd.tokenizers.store import load_official, load_tokenizer, save_tokenizer
from varkd.tokenizers.vq import VQ, VQConfig

TINY = VQConfig(image_size=8, ch=32, ch_mult=(1, 2), z_channels=8, num_res_blocks=1, decoder_res_blocks=2,
                vocab_size=32, codebook_dim=4, norm_groups=32)  # fmt: skip


@pytest.fixture
def tokenizer() -> VQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQ(TINY).eval()


@pytest.fixture
def folder(tokenizer: VQ, tmp_path: Path) -> Path:
    save_tokenizer(tokenizer, tmp_path / "tokenizer", {"psnr": 20.0})
    return tmp_path / "tokenizer"


@torch.no_grad()
def test_vq_comes_back_identical(tokenizer: VQ, folder: Path):
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, VQ) and loaded.config == TINY and loaded.hash == tokenizer.hash
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = loaded.encode(images)
    assert torch.equal(codes, tokenizer.encode(images))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "fit.json"}


def test_pixels_come_back_without_weights(tmp_path: Path):
    save_tokenizer(Pixels(PixelsConfig(levels=5)), str(tmp_path / "pixels"))
    loaded = load_tokenizer(str(tmp_path / "pixels"))
    assert loaded.config == PixelsConfig(levels=5) and loaded.hash == Pixels(PixelsConfig(levels=5)).hash
    assert loaded.codebook_VE.shape == (5, 1) and loaded.codebook_VE.device.type == "cpu"
    assert [path.name for path in (tmp_path / "pixels").iterdir()] == ["config.json"]


def test_saving_again_replaces_a_tokenizer_but_nothing_else(tokenizer: VQ, folder: Path):
    save_tokenizer(tokenizer, folder)
    assert not (folder / "fit.json").exists()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(VarkdError, match="no part of a tokenizer"):
        save_tokenizer(tokenizer, folder)
    assert (folder / "thesis.tex").read_text() == "precious"


def edit(change: dict) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return apply


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def change_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["quant_conv.bias"][0] += 1e-3
    save_file(state, folder / "model.safetensors")


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no tokenizer in"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "truncated weights": (truncate("model.safetensors"), "is truncated"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated"),
    "truncated config": (truncate("config.json"), "not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a tokenizer's config"),
    "no hash": (edit({"hash": None}), "not a tokenizer's config"),
    "unknown kind": (edit({"kind": "vqq"}), "did you mean 'vq'"),
    "unknown field": (edit({"image_sise": 8}), "did you mean 'image_size'"),
    "missing field": (edit({"ch": None}), "lacks the field 'ch'"),
    "wrong type": (edit({"ch": "32"}), "should look like 128, got '32'"),
    "wrong list": (edit({"ch_mult": [1, "2"]}), "field 'ch_mult'"),
    "impossible size": (edit({"image_size": 7}), "multiple of 2"),
    "other shapes": (edit({"vocab_size": 64}), r"'quantize.embedding.weight' in .* has shape \(32, 4\)"),
    "more levels": (edit({"decoder_res_blocks": 3}), "lacks tensor 'decoder"),
    "fewer blocks": (edit({"decoder_res_blocks": 1}), "unexpected tensor 'decoder"),
    "same shapes, other config": (edit({"norm_groups": 16}), "was changed after it was saved"),
    "one weight": (change_weight, "was changed after it was saved"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(folder: Path, case: str):
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(VarkdError, match=words) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


OFFICIAL = {
    "vq": VQ(TINY),
    "multiscale": MultiScale(MultiScaleConfig(8, ch=32, ch_mult=(1, 2), z_channels=4, num_res_blocks=1,
                                              decoder_res_blocks=2, vocab_size=32, scales=(1, 3, 4), num_phi=2)),
    "maskgit": MaskGIT(MaskGITConfig(8, ch=32, ch_mult=(1, 2), z_channels=4, num_res_blocks=1, vocab_size=32)),
}  # fmt: skip
SCALES = {"multiscale": (1, 3, 4)}
WRAPS: dict[str, Callable[[dict], dict]] = {
    "raw": lambda state: state,
    "model": lambda state: {"model": state, "optimizer": {}, "args": argparse.Namespace(lr=0.1)},
    "state_dict": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "VAR's trainer": lambda state: {"trainer": {"var_wo_ddp": {"head.bias": torch.zeros(2)}, "vae_local": state}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_file(tmp_path: Path, kind: str, wrap: str):
    tokenizer = OFFICIAL[kind]
    torch.save(WRAPS[wrap](tokenizer.state_dict()), tmp_path / "official.pt")
    loaded = load_official(tmp_path / "official.pt", image_size=8, scales=SCALES.get(kind))
    assert loaded.config == tokenizer.config and loaded.hash == tokenizer.hash
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    save_tokenizer(loaded, tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder").hash == tokenizer.hash


@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_safetensors_of_half_precision(tmp_path: Path, kind: str):
    state = {name: value.half() for name, value in OFFICIAL[kind].state_dict().items()}
    save_file(state, tmp_path / "official.safetensors")
    loaded = load_official(tmp_path / "official.safetensors", 8, kind, SCALES.get(kind))
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert torch.equal(loaded.codebook_VE, load_official(tmp_path / "official.safetensors", 8,
                                                         scales=SCALES.get(kind)).codebook_VE)  # fmt: skip


@pytest.mark.parametrize(("kind", "usage"), [("vq", "codebook_used"), ("multiscale", "ema_vocab_hit_SV")])
def test_usage_statistics_are_no_part_of_a_tokenizer(tmp_path: Path, kind: str, usage: str):
    state = OFFICIAL[kind].state_dict()
    hashes = set()
    for change in ({}, {f"quantize.{usage}": state[f"quantize.{usage}"] + 3}, {f"quantize.{usage}": None}):
        torch.save({name: value for name, value in {**state, **change}.items() if value is not None}, tmp_path / "a.pt")
        hashes.add(load_official(tmp_path / "a.pt", 8, scales=SCALES.get(kind)).hash)
    assert hashes == {OFFICIAL[kind].hash}


def test_official_vq8_is_recognized_by_its_shapes():
    """Four levels instead of five: eight pixels a code."""
    with torch.device("meta"):
        model = VQ(VQConfig(ch_mult=(1, 2, 2, 4)))
    config = VQConfig.infer({name: tuple(value.shape) for name, value in model.state_dict().items()}, 256)
    assert config == model.config and config.downsampling == 8 and model.grid == (32, 32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_109_835


def test_the_scales_of_an_official_file_follow_from_the_image_size_or_are_given(tmp_path: Path):
    path = tmp_path / "vae.pth"
    with torch.device("meta"):
        official = MultiScale(MultiScaleConfig())
    shapes = {name: tuple(value.shape) for name, value in official.state_dict().items()}
    assert MultiScaleConfig.infer(shapes, 256) == official.config
    assert MultiScaleConfig.infer(shapes, 512).scales == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    torch.save(OFFICIAL["multiscale"].state_dict(), path)
    with pytest.raises(VarkdError, match=r"give the sides of its 3 maps \(--scales 1 2 ...\)"):
        load_official(path, 8)
    with pytest.raises(VarkdError, match=r"it has 3 scales, got \(1, 4\)"):
        load_official(path, 8, scales=(1, 4))
    with pytest.raises(VarkdError, match=r"scales must rise to image_size / downsampling = 4, got \(1, 2, 8\)"):
        load_official(path, 8, scales=[1, 2, 8])
    with pytest.raises(VarkdError, match="it has 3 scales"):
        load_official(path, 256)


def test_official_files_of_another_kind(tmp_path: Path):
    path = tmp_path / "official.pt"
    torch.save(OFFICIAL["maskgit"].state_dict(), path)
    with pytest.raises(VarkdError, match="leave out --scales"):
        load_official(path, 8, scales=(1, 2, 4))
    with pytest.raises(VarkdError, match="is a tokenizer of kind maskgit, not vq"):
        load_official(path, 8, "vq")
    with pytest.raises(VarkdError, match="did you mean 'maskgit'"):
        load_official(path, 8, "maskgitt")
    torch.save({**OFFICIAL["maskgit"].state_dict(), "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(VarkdError, match=r"unexpected tensor 'extra.weight'"):
        load_official(path, 8)
    torch.save({**OFFICIAL["maskgit"].state_dict(), "quantize.embedding.weight": torch.zeros(3)}, path)
    with pytest.raises(VarkdError, match="its tensors have other shapes"):
        load_official(path, 8)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused_unread(tmp_path: Path, modern: bool):
    trap = tmp_path / "trap"
    torch.save({"model": Malicious(trap)}, tmp_path / "vq.pt", _use_new_zipfile_serialization=modern)
    with pytest.raises(VarkdError, match="not a plain PyTorch file") as caught:
        load_official(tmp_path / "vq.pt", image_size=8)
    assert not trap.exists() and "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # the trap does work where it is unpickled


def test_damaged_official_files(tokenizer: VQ, tmp_path: Path):
    path = tmp_path / "vq.pt"
    with pytest.raises(VarkdError, match="no such file"):
        load_official(path, 8)
    torch.save(tokenizer.state_dict(), path)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 50):
        path.write_bytes(content[:length])
        with pytest.raises(VarkdError, match="download it again"):
            load_official(path, 8)
    torch.save({"model": [1, 2]}, path)
    with pytest.raises(VarkdError, match="holds no state dict"):
        load_official(path, 8)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(VarkdError, match="is no tokenizer that varkd knows"):
        load_official(path, 8)
    torch.save({name: value for name, value in tokenizer.state_dict().items() if "conv_in" not in name}, path)
    with pytest.raises(VarkdError, match=r"not a whole vq tokenizer: it lacks the tensor 'encoder.conv_in.weight'"):
        load_official(path, 8)
    torch.save(tokenizer.state_dict(), path)
    with pytest.raises(VarkdError, match="image_size 9 is not a multiple of 2"):
        load_official(path, 9)


def small(kind: str) -> Tokenizer:
    torch.manual_seed(0)
    if kind == "pixels":
        return Pixels(PixelsConfig())
    if kind == "maskgit":
        sizes = {"ch_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 4}
        return MaskGIT(MaskGITConfig(image_size=8, ch=8, z_channels=4, vocab_size=32, **sizes))
    return VQ(VQConfig.small(16, 1, 32, 4)) if kind == "vq" else MultiScale(MultiScaleConfig.small(16, 1, 32, 4))


@pytest.mark.parametrize("kind", ["vq", "multiscale", "maskgit", "pixels"])
def test_merged_codes_decode_to_the_mean_of_their_group(kind: str):
    """Codes of one group become one; groups of one change nothing; the tokenizer itself stays as it was."""
    tokenizer = small(kind)
    before, vocab_size = tokenizer.hash, tokenizer.vocab_size
    codes_BL = torch.randint(vocab_size, (2, tokenizer.sequence_length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = tokenizer.merged(torch.arange(vocab_size)).decode(codes_BL)
        torch.testing.assert_close(alone, tokenizer.decode(codes_BL))
        group_V = torch.arange(vocab_size) // 3
        merged = tokenizer.merged(group_V)
        assert merged.decode(codes_BL).equal(merged.decode(codes_BL // 3 * 3))
        groups = [tokenizer.codebook_VE[group_V == group] for group in range(int(group_V.max()) + 1)]
        means = torch.stack([vectors.mean(0) for vectors in groups])
        torch.testing.assert_close(merged.entries_VE, means[group_V])
    del tokenizer.hash
    assert tokenizer.hash == before
