"""Students without PyTorch: onnxruntime and the browser draw the very codes that varkd draws."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from browsing import browser, fits
from tiny_runs import codes, train
from varkd.cli import main
from varkd.errors import VarkdError
from varkd.rollout import Sampler, draw
from varkd.run import portable
from varkd.run.models import load_trained
from varkd.sampling import generate_with_codes
from varkd.world import Rng

__all__ = ["browser", "codes"]

pytest.importorskip("onnxscript")
SETTINGS = [
    Sampler(), Sampler(temperature=0.7, top_k=5), Sampler(guidance=2.5, top_p=0.8), Sampler(temperature=0.0),
    Sampler(guidance=1.5, temperature=1.2, top_k=8, top_p=0.9),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    out = tmp_path_factory.mktemp("portable") / "run"
    return train(out, codes, "method=ce", "train.updates=20", "model.num_layers=2", "model.num_heads=2",
                 "evaluation.sampler.temperature=0.9", "name=tiny & small")  # fmt: skip


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.with_name("onnx")
    assert main(["export", str(run), "--onnx", str(out)]) == 0
    return out


def ours(run: Path, labels: list[int], seed: int, sampler: Sampler) -> tuple[Tensor, Tensor]:
    _, folder, model = load_trained(run, "cpu")
    return generate_with_codes(model, folder.tokenizer, torch.tensor(labels), sampler, seed, quiet=True)


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("portable_sample", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("sampler", SETTINGS)
def test_onnxruntime_draws_our_codes(run: Path, exported: Path, sampler: Sampler):
    labels = [0, 3, 9, 1, 1]
    settings = {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    images, drawn = module(exported / "sample.py").sample(labels, seed=3, **settings)
    expected_images, expected = ours(run, labels, 3, sampler)
    assert torch.from_numpy(drawn).equal(expected)
    assert torch.from_numpy(images).permute(0, 3, 1, 2).equal(expected_images)


def test_the_runs_own_settings_are_the_default(run: Path, exported: Path):
    _, drawn = module(exported / "sample.py").sample([4], seed=1)
    assert torch.from_numpy(drawn).equal(ours(run, [4], 1, Sampler(temperature=0.9))[1])
    about = json.loads((exported / "about.json").read_text())
    assert about["name"] == "tiny & small" and len(about["class_names"]) == 10


def test_the_script_needs_neither_torch_nor_varkd(exported: Path):
    text = (exported / "sample.py").read_text()
    imported = [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {name.split(".")[0] for name in imported} & {"torch", "varkd"} == set()
    assert sorted(path.name for path in exported.iterdir()) == ["about.json", "decoder.onnx", "sample.py", "step.onnx"]


def test_other_families_and_bad_places_are_one_line(run: Path, codes: Path, tmp_path: Path, capsys):
    other = train(tmp_path / "randar", codes, "method=ce", "model.family=randar")
    for command, words in (
        (["export", other, "--onnx", tmp_path / "a"], "only a LlamaGen"),
        (["export", run, "--onnx", other], "is not empty"),
        (["export", run], "give one of --out, --onnx and --web"),
        (["export", run, "--onnx", tmp_path / "a", "--web", tmp_path / "b"], "give one of"),
        (["export", run, "--web", tmp_path / "a", "--runtime", tmp_path], "give an unpacked onnxruntime-web package"),
    ):
        capsys.readouterr()
        assert main([str(part) for part in command]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- the browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture(scope="module")
def serve() -> Iterator:
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()


def test_the_pages_random_numbers_and_draws_are_ours(browser, serve, tmp_path: Path):
    script = files("varkd.publishing").joinpath("portable", "varkd.js").read_text(encoding="utf-8")
    (tmp_path / "varkd.js").write_text(script, encoding="utf-8")
    (tmp_path / "index.html").write_text("<!doctype html><title>test</title>")
    page = browser.new_page()
    page.goto(serve(tmp_path))
    for seed, row in ((0, 0), (7, 123), (2**31, 5)):
        found = page.evaluate(
            "async ([s, r]) => Array.from((await import('./varkd.js')).uniform(s, r, 700))", [seed, row]
        )
        assert torch.tensor(found).equal(Rng(seed).uniform("sample", torch.tensor([row]), 700)[0])
    logits_BV = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)) * 3
    uniform_B = torch.rand(40, generator=torch.Generator().manual_seed(1))
    for sampler in SETTINGS:
        settings = {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p")}
        found = page.evaluate(
            "async ([rows, us, s]) => { const { draw } = await import('./varkd.js');"
            " return rows.map((row, i) => draw(Float32Array.from(row), us[i], s)); }",
            [logits_BV.tolist(), uniform_B.tolist(), settings],
        )
        assert torch.tensor(found).equal(draw(logits_BV, sampler, uniform_B)[0])
    page.close()


@pytest.fixture(scope="module")
def site(run: Path, serve) -> str:
    try:
        portable._cached()
    except VarkdError as error:
        pytest.skip(str(error))
    out = run.with_name("web")
    assert main(["export", str(run), "--web", str(out)]) == 0
    return serve(out)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_draws_our_codes_on_the_visitors_machine(run: Path, site: str, browser, width: int):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("http", "ws")) and not asked.url.startswith(site)
            and complaints.append(f"network: {asked.url}"))  # fmt: skip
    page.goto(site)
    page.get_by_text("a second").wait_for()
    assert page.get_by_role("heading").inner_text() == "tiny & small"
    drawn = torch.tensor(page.evaluate("window.lastCodes")).view(8, -1)
    assert drawn.equal(ours(run, list(range(8)), 0, Sampler(temperature=0.9))[1])

    page.get_by_label("Class").select_option("3")
    for name, value in (("Images", "5"), ("Seed", "11"), ("Guidance", "1.75"), ("Top-k", "9")):
        page.get_by_label(name).fill(value)
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("5 images").wait_for()
    drawn = torch.tensor(page.evaluate("window.lastCodes")).view(5, -1)
    sampler = replace(Sampler(temperature=0.9), guidance=1.75, top_k=9)
    assert drawn.equal(ours(run, [3] * 5, 11, sampler)[1])
    assert page.locator("canvas").count() == 5 and fits(page)
    page.close()
    assert complaints == []
