"""`varkd export RUN --onnx DIR` and `--web DIR`: a student that runs without PyTorch."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import urllib.request
from importlib.resources import files
from pathlib import Path

from varkd.errors import VarkdError
from varkd.files import atomic_folder, cache_folder, sha256_of
from varkd.folders import Own, json_with
from varkd.publishing.onnx import ABOUT, DECODER, STEP, write_onnx
from varkd.run.models import load_trained
from varkd.run.official import check_new

_RUNTIME_VERSION = "1.30.0"
_RUNTIME_URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{_RUNTIME_VERSION}.tgz"
_RUNTIME_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
_RUNTIME = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PAGE = ("index.html", "varkd.js")
PORTABLE = Own("an exported model", (ABOUT,), json_with("vocab_size", "head_dim", "sampler"),
               (STEP, DECODER, "*.onnx.data", "sample.py", *_PAGE, *_RUNTIME))  # fmt: skip


def export_portable(run_folder: Path, out: Path, *, web: bool = False, runtime: Path | None = None) -> str:
    """Write a run's model and tokenizer as ONNX graphs with `sample.py`, and with `web` a page that samples from them.

    Args:
        runtime: an unpacked onnxruntime-web package; by default it is downloaded once into the user's cache.

    Returns:
        A line for a person: what was written, and how large it is.

    Raises:
        VarkdError: no run, another family than LlamaGen, `out` holds something, or there is no runtime.
    """
    check_new(out)
    PORTABLE.check_replaceable(out)
    run, codes, model = load_trained(run_folder, "cpu")
    runtime_files = _runtime(runtime) if web else {}
    with atomic_folder(out, PORTABLE) as folder:
        write_onnx(model, codes.tokenizer, run.evaluation.sampler, folder, run.name or run_folder.name)
        for name in ("sample.py", *(_PAGE if web else ())):
            source = files("varkd.publishing").joinpath("portable", name)
            (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        for name, content in runtime_files.items():
            (folder / name).write_bytes(content)
    sizes = {name: (out / name).stat().st_size / 2**20 for name in (STEP, DECODER)}
    told = f"model {sizes[STEP]:.2f} MiB, decoder {sizes[DECODER]:.2f} MiB"
    if not web:
        return f"{told}; draw with: python {out / 'sample.py'}"
    total = sum(len(content) for content in runtime_files.values()) / 2**20
    return f"{told}, runtime {total:.1f} MiB; open with: python -m http.server --directory {out}"


def _runtime(given: Path | None) -> dict[str, bytes]:
    """The three files of onnxruntime-web that the page loads."""
    folder = given / "dist" if given is not None and (given / "dist").is_dir() else given or _cached()
    for name in _RUNTIME:
        if not (folder / name).is_file():
            raise VarkdError(f"{folder} has no {name}: give an unpacked onnxruntime-web package with --runtime")
    return {name: (folder / name).read_bytes() for name in _RUNTIME}


def _cached() -> Path:
    """The runtime in the user's cache, downloaded on first use."""
    folder = cache_folder() / f"onnxruntime-web-{_RUNTIME_VERSION}"
    if all((folder / name).is_file() for name in _RUNTIME):
        return folder
    try:
        with urllib.request.urlopen(_RUNTIME_URL, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise VarkdError(
            f"cannot download {_RUNTIME_URL} ({error}): get it with `npm pack onnxruntime-web@"
            f"{_RUNTIME_VERSION}`, unpack it, and give --runtime DIR"
        ) from error
    if sha256_of(content) != _RUNTIME_SHA256:
        raise VarkdError(f"{_RUNTIME_URL} is not the file that is expected (its hash differs): give --runtime DIR")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in _RUNTIME:
            member = archive.extractfile(f"package/dist/{name}")
            if member is not None:
                (temporary / name).write_bytes(member.read())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder
