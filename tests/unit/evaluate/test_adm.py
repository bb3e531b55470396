"""ADM's numbers as a library: files and formats, intervals, conventions, ranks."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import adm_inputs as inputs
from varkd import metrics
from varkd.errors import VarkdError
from varkd.evaluate import inception_files
from varkd.evaluate.adm import AdmResult, protocol_differences
from varkd.evaluate.fid import frechet_draws, gaussian
from varkd.evaluate.image_files import class_sorted, open_image_files
from varkd.evaluate.inception import Inception
from varkd.evaluate.inception_files import load_inception, tensorflow_scopes
from varkd.evaluate.inception_score import inception_score_interval
from varkd.evaluate.manifolds import precision_recall
from varkd.evaluate.moments import frechet, frechet_interval, gaussian_of
from varkd.files import file_hash

SIZE = 24


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.weights(1).items()}


@pytest.fixture(scope="module")
def net(state: dict[str, Tensor]) -> Inception:
    return Inception(state, "random")


def pixels(first: int, count: int) -> np.ndarray:
    return inputs.images(5, first, count, SIZE)


def message(proto_field: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""

    def varint(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    return varint(proto_field << 3 | 2) + varint(len(content)) + content


def graph(state: dict[str, Tensor]) -> bytes:
    """A GraphDef that holds the weights as TensorFlow's converter writes constants, and one integer constant."""

    def node(name: str, value: np.ndarray, kind: int = 1) -> bytes:
        dims = b"".join(message(2, b"\x08" + bytes(_varint(size))) for size in value.shape)
        tensor = struct.pack("BB", 8, kind) + message(2, dims) + message(4, value.tobytes())
        attribute = message(1, b"value") + message(2, message(8, tensor))
        return message(1, message(1, name.encode()) + message(2, b"Const") + message(5, attribute))

    numpy = {name: value.numpy() for name, value in state.items()}
    parts = [node("shape", np.array([1, 2048], dtype=np.int32), 3)]
    for name, scope in tensorflow_scopes().items():
        kernel = np.ascontiguousarray(numpy[f"{name}.conv.weight"].transpose(2, 3, 1, 0))
        parts.append(node(f"{scope}/conv2d_params", kernel))
        names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        parts += [node(f"{scope}/batchnorm/{theirs}", numpy[f"{name}.bn.{own}"]) for own, theirs in names.items()]
    parts.append(node("softmax/weights", np.ascontiguousarray(numpy["fc.weight"].T)))
    return b"".join([*parts, node("softmax/biases", numpy["fc.bias"])])


def _varint(value: int) -> list[int]:
    return [value] if value < 128 else [value & 127 | 128, *_varint(value >> 7)]


def test_every_format_gives_the_same_network(tmp_path: Path, state: dict[str, Tensor]):
    counters = {f"{name}.bn.num_batches_tracked": torch.tensor(7) for name, *_ in inputs.conv_table()}
    torch.save(state, tmp_path / "472.pth")
    torch.save({**state, **counters}, tmp_path / "566.pth")
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "graph.pb").write_bytes(graph(state))
    names = ("472.pth", "566.pth", "weights.safetensors", "graph.pb")
    networks = [load_inception(tmp_path / name) for name in names]
    assert len({network.hash for network in networks}) == 1
    images = torch.from_numpy(pixels(0, 1)).permute(0, 3, 1, 2)
    assert len({float(network(images).pool_BF.sum()) for network in networks}) == 1


def test_the_cache_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = inception_files.cache_folder() / Path(inception_files.RELEASES[0]).name
    fetched: list[str] = []

    def fetch(url: str, target: Path) -> None:
        fetched.append(url)
        if len(fetched) == 1:
            raise ConnectionError("refused")
        torch.save(state, target)

    monkeypatch.setattr(inception_files, "_fetch", fetch)
    with pytest.raises(VarkdError, match=r"refused.*another SHA-256.*--inception"):
        load_inception()
    assert not path.exists() and len(fetched) == 2
    torch.save(state, tmp_path / "right.pth")
    monkeypatch.setattr(inception_files, "RELEASE_SHA256", file_hash(tmp_path / "right.pth"))
    monkeypatch.setattr(inception_files, "_fetch", lambda url, target: target.write_bytes(
        (tmp_path / "right.pth").read_bytes()))  # fmt: skip
    assert load_inception().hash == load_inception(tmp_path / "right.pth").hash
    path.write_bytes(b"other")
    with pytest.raises(VarkdError, match="is damaged"):
        load_inception()


def test_images_come_alike_from_files_folders_and_arrays(tmp_path: Path):
    images = pixels(0, 12)
    np.savez(tmp_path / "stored.npz", images, np.arange(12))
    np.savez_compressed(tmp_path / "packed.npz", images)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(images):  # natural order: 9 before 10
        Image.fromarray(image).save(tmp_path / "folder" / f"{index}.png")
    sources = [tmp_path / "stored.npz", tmp_path / "packed.npz", tmp_path / "folder", images,
               torch.from_numpy(images).permute(0, 3, 1, 2)]  # fmt: skip
    for source in sources:
        opened = open_image_files(source)
        assert (opened.num, opened.height, opened.width) == (12, SIZE, SIZE)
        for begin, end, size in ((0, 12, 5), (7, 12, 2), (3, 4, 8)):
            found = torch.cat(list(opened.batches(begin, end, size))).permute(0, 2, 3, 1)
            assert np.array_equal(found.numpy(), images[begin:end])


def test_lossy_and_class_sorted_folders_are_warned_of(tmp_path: Path, net: Inception):
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for index, image in enumerate(pixels(0, 20)):
            Image.fromarray(image).save(tmp_path / "images" / label / f"{index}.jpg")
    opened = open_image_files(tmp_path / "images")
    assert "stored with loss" in opened.warnings[0]
    assert opened.labels is not None and class_sorted(opened.labels)


def test_class_order_is_recognized():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 20)
    assert class_sorted(labels)
    assert not class_sorted(rng.permutation(labels))
    assert not class_sorted(np.arange(1000) % 50)
    assert not class_sorted(np.zeros(100, dtype=np.int64)), "one class has no order"
    noisy = np.where(rng.random(1000) < 0.4, rng.integers(0, 50, 1000), labels)
    assert class_sorted(noisy), "as a network predicts"


def test_mode_collapse_lowers_recall_and_noise_lowers_precision():
    """Which of the two numbers is which: the trap of swapped arguments."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(400, 16, generator=rng)
    collapsed = real[:20].repeat(20, 1) + 0.01 * torch.randn(400, 16, generator=rng)
    noise = 4 * torch.randn(400, 16, generator=rng)
    for mode in ("adm", "float32"):
        precision, recall = metrics.precision_recall(real, collapsed, mode=mode)
        assert precision > 0.95 and recall < 0.3
        precision, recall = metrics.precision_recall(real, noise, mode=mode)
        assert precision < 0.3 and recall > 0.9


def test_the_interval_of_the_distance_agrees_with_a_bootstrap():
    rng = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=rng)
    samples, real = torch.randn(800, 6, generator=rng) @ mix + 0.1, torch.randn(2000, 6, generator=rng) @ mix
    own, other = gaussian_of(samples), gaussian_of(real)
    value = frechet(own, other)
    found = frechet_interval(samples, own, other, value)
    assert found is not None and found.low < value < found.high
    _, draws = frechet_draws(samples, *gaussian(real), resamples=2000)
    assert (found.high - found.low) / 3.92 == pytest.approx(float(draws.std()), rel=0.15)
    assert frechet_interval(samples[:11], gaussian_of(samples[:11]), other, value) is None


def test_few_samples_take_the_same_distance_without_a_decomposition():
    rng = torch.Generator().manual_seed(2)
    few, many = gaussian_of(torch.randn(20, 32, generator=rng)), gaussian_of(torch.randn(200, 32, generator=rng))
    assert few.factor_FN is not None
    plain = type(few)(few.mean_F, few.covariance_FF, few.num)
    assert frechet(few, many) == pytest.approx(frechet(plain, many), rel=1e-9)


def test_intervals_hold_their_values():
    rng = torch.Generator().manual_seed(3)
    score = inception_score_interval(torch.randn(300, 10, generator=rng) * 2, resamples=50, chunk=100)
    assert 1 <= score.low < score.value < score.high
    real, samples = torch.randn(200, 4, generator=rng), torch.randn(300, 4, generator=rng) * 0.5
    found = precision_recall(real, samples, resamples=50)
    for estimate in (found.precision, found.recall):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert found.recall.low < found.recall.high


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch):
    from varkd.evaluate import manifolds

    rng = torch.Generator().manual_seed(4)
    real, samples = torch.rand(700, 64, generator=rng), torch.rand(900, 64, generator=rng)
    whole = precision_recall(real, samples, resamples=3)
    monkeypatch.setattr(manifolds, "_BLOCK", 208)
    monkeypatch.setattr(manifolds, "_ROWS", 64)
    monkeypatch.setattr(manifolds, "_NARROW", 10)
    assert precision_recall(real, samples, resamples=3) == whole


def test_kid_and_fid_infinity():
    rng = torch.Generator().manual_seed(5)
    real, same = torch.randn(4000, 8, generator=rng), torch.randn(4000, 8, generator=rng)
    assert abs(metrics.kid(real, same, 20, 500)) < 0.01
    assert metrics.kid(real, same + 0.5, 20, 500) > 0.1
    x, y = (points.double() for points in (same[:30], real[:30]))
    kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3
    off = lambda matrix: (matrix.sum() - matrix.trace()) / (30 * 29)
    expected = off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert metrics.kid(real[:30], same[:30], 1, 30) == pytest.approx(float(expected), rel=1e-9)
    # of the same distribution FID falls like 1/N towards that of the reference's own finite size
    assert abs(metrics.fid_infinity(same, real)) < metrics.frechet_distance(same[:1000], real)


def test_a_saved_reference_needs_no_images(tmp_path: Path, net: Inception):
    reference = metrics.open_reference(_npz(tmp_path / "real.npz", pixels(0, 8)), net)
    metrics.save_reference(reference, tmp_path / "saved")
    samples = pixels(8, 6)
    direct, saved = (metrics.adm(samples, source, net, resamples=0) for source in (reference, tmp_path / "saved"))
    assert saved.values == pytest.approx(direct.values, rel=1e-9) and saved.protocol == direct.protocol
    other = Inception({name: torch.from_numpy(value) for name, value in inputs.weights(2).items()}, "other")
    with pytest.raises(VarkdError, match="seen by other Inception weights"):
        metrics.adm(samples, tmp_path / "saved", other)
    data = tmp_path / "saved" / "reference.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(VarkdError, match="is damaged"):
        metrics.open_reference(tmp_path / "saved", net)


def test_statistics_alone_give_fid_and_say_what_is_missing(tmp_path: Path, net: Inception):
    real = metrics.open_reference(_npz(tmp_path / "real.npz", pixels(0, 8)), net).pool
    np.savez(tmp_path / "stats.npz", mu=real.mean_F, sigma=real.covariance_FF)
    found = metrics.adm(pixels(8, 6), tmp_path / "stats.npz", net, resamples=0)
    assert found["fid"] is not None and found["sfid"] is found["precision"] is found["recall"] is None
    assert [line for line in found.warnings if "no sFID" in line or "no precision" in line][1:]


def _npz(path: Path, images: np.ndarray) -> Path:
    np.savez(path, images)
    return path


def result(**protocol: object) -> AdmResult:
    return AdmResult({"fid": 2.0}, {"fid": None}, {"num": 10, **protocol})


def test_results_of_different_protocols_are_not_compared():
    assert metrics.compare({"a": result(), "b": result()})["a"] == {"fid": 2.0}
    with pytest.raises(VarkdError, match="different protocols: num: 10 / 20"):
        metrics.compare({"a": result(), "b": result(num=20)})
    assert protocol_differences([{"reference": {"name": "x"}}, {"reference": {"name": "y"}}]) == []
    again = AdmResult.from_json(result().to_json())
    assert again.values == {"fid": 2.0} and again.protocol == {"num": 10}
