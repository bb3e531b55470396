"""The files in which the 2015 Inception network is published, read without running anything that stands in them.

State dicts of torch-fidelity and pytorch-fid (`.pth`, the same bytes), the same tensors as safetensors, and
TensorFlow's frozen graph (`classify_image_graph_def.pb`), whose constants are parsed here without TensorFlow.
NVIDIA's `inception-2015-12-05.pt` is TorchScript, a program: it is refused. Without a file, one of the two public
releases is downloaded once, its SHA-256 checked, and kept in the user's cache.
"""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkd.containers import read_state
from varkd.errors import VarkdError
from varkd.evaluate.inception import Inception, check_state, conv_units
from varkd.files import atomic_file, cache_folder, file_hash
from varkd.types import state_hash

RELEASES = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
RELEASE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_TIMEOUT = 30
_BLOCK = 1 << 20


def load_inception(
    path: str | Path | None = None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Inception:
    """The network in evaluation mode.

    Args:
        path: a weight file; None takes the release in the user's cache, downloading it on first use.
        dtype: float32 for published numbers; float64 to see what rounding does.

    Raises:
        VarkdError: no such file, a damaged one, another network, TorchScript, or a failed download.
    """
    path = Path(path) if path is not None else downloaded()
    try:
        state = check_state(read_inception_state(path))
    except VarkdError as error:
        raise error if str(path) in str(error) else VarkdError(f"{path}: {error}") from None
    return Inception(state, state_hash("inception-2015-12-05", state), dtype).to(device)


def read_inception_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a published file under torch-fidelity's names, float32 on the CPU.

    Raises:
        VarkdError: see `load_inception`.
    """
    if path.is_file() and zipfile.is_zipfile(path) and _is_torchscript(path):
        raise VarkdError(
            f"{path} is TorchScript, a program that would have to be run: give the state dict that "
            f"torch-fidelity or pytorch-fid publish ({Path(RELEASES[0]).name})"
        )
    if path.suffix == ".pb":
        state = _from_graph(path)
    else:
        state = read_state(path).state
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def downloaded() -> Path:
    """The published weights in the user's cache, fetched there on first use.

    Raises:
        VarkdError: neither release could be reached, or what came had another SHA-256.
    """
    path = cache_folder() / Path(RELEASES[0]).name
    if path.is_file():
        if file_hash(path) != RELEASE_SHA256:
            raise VarkdError(f"{path} is damaged (its SHA-256 is another): delete it and run again")
        return path
    reasons = []
    for url in RELEASES:
        try:
            with atomic_file(path) as temporary:
                _fetch(url, temporary)
                if file_hash(temporary) != RELEASE_SHA256:
                    raise VarkdError("it came with another SHA-256")
            return path
        except (urllib.error.URLError, TimeoutError, ConnectionError, VarkdError) as error:
            reasons.append(f"{url.split('/')[4]}: {getattr(error, 'reason', error)}")
    raise VarkdError(
        f"could not download the Inception weights ({'; '.join(reasons)}): fetch {RELEASES[0]} yourself "
        f"and give it with --inception"
    )


def _fetch(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, path.open("wb") as file:
        while block := answer.read(_BLOCK):
            file.write(block)


def _from_graph(path: Path) -> dict[str, Tensor]:
    """The constants of TensorFlow's frozen graph under torch's names: HWIO kernels become OIHW."""
    if not path.is_file():
        raise VarkdError(f"no such file: {path}")
    try:
        constants = dict(_constants(memoryview(path.read_bytes())))
    except (LookupError, ValueError, RuntimeError, TypeError, OverflowError, MemoryError):
        raise VarkdError(f"{path} is truncated or not a TensorFlow graph: download it again") from None
    state = {}
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    try:
        for name, scope in tensorflow_scopes().items():
            state[f"{name}.conv.weight"] = constants[f"{scope}/conv2d_params"].permute(3, 2, 0, 1).contiguous()
            state |= {f"{name}.bn.{own}": constants[f"{scope}/batchnorm/{theirs}"] for own, theirs in parts.items()}
        state["fc.weight"] = constants["softmax/weights"].T.contiguous()
        state["fc.bias"] = constants["softmax/biases"]
    except KeyError as error:
        raise VarkdError(f"{path} is not the 2015 Inception graph: it has no constant {error}") from None
    except RuntimeError:
        raise VarkdError(f"{path} is not the 2015 Inception graph: its constants have other shapes") from None
    return state


def tensorflow_scopes() -> dict[str, str]:
    """Unit name -> scope in `classify_image_graph_def.pb`, for all 94 units."""
    names = {
        "Conv2d_1a_3x3": "conv",
        "Conv2d_2a_3x3": "conv_1",
        "Conv2d_2b_3x3": "conv_2",
        "Conv2d_3b_1x1": "conv_3",
        "Conv2d_4a_3x3": "conv_4",
    }
    blocks = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    mixed = {f"Mixed_{block}": "mixed" + (f"_{index}" if index else "") for index, block in enumerate(blocks)}
    branches = {
        "5": {
            "branch1x1": "conv",
            "branch5x5_1": "tower/conv",
            "branch5x5_2": "tower/conv_1",
            "branch3x3dbl_1": "tower_1/conv",
            "branch3x3dbl_2": "tower_1/conv_1",
            "branch3x3dbl_3": "tower_1/conv_2",
            "branch_pool": "tower_2/conv",
        },
        "6a": {
            "branch3x3": "conv",
            "branch3x3dbl_1": "tower/conv",
            "branch3x3dbl_2": "tower/conv_1",
            "branch3x3dbl_3": "tower/conv_2",
        },
        "6": {
            "branch1x1": "conv",
            "branch7x7_1": "tower/conv",
            "branch7x7_2": "tower/conv_1",
            "branch7x7_3": "tower/conv_2",
            "branch7x7dbl_1": "tower_1/conv",
            "branch7x7dbl_2": "tower_1/conv_1",
            "branch7x7dbl_3": "tower_1/conv_2",
            "branch7x7dbl_4": "tower_1/conv_3",
            "branch7x7dbl_5": "tower_1/conv_4",
            "branch_pool": "tower_2/conv",
        },
        "7a": {
            "branch3x3_1": "tower/conv",
            "branch3x3_2": "tower/conv_1",
            "branch7x7x3_1": "tower_1/conv",
            "branch7x7x3_2": "tower_1/conv_1",
            "branch7x7x3_3": "tower_1/conv_2",
            "branch7x7x3_4": "tower_1/conv_3",
        },
        "7": {
            "branch1x1": "conv",
            "branch3x3_1": "tower/conv",
            "branch3x3_2a": "tower/mixed/conv",
            "branch3x3_2b": "tower/mixed/conv_1",
            "branch3x3dbl_1": "tower_1/conv",
            "branch3x3dbl_2": "tower_1/conv_1",
            "branch3x3dbl_3a": "tower_1/mixed/conv",
            "branch3x3dbl_3b": "tower_1/mixed/conv_1",
            "branch_pool": "tower_2/conv",
        },
    }
    for name, *_ in conv_units():
        if name not in names:
            block, branch = name.split(".")
            kind = block.removeprefix("Mixed_")
            names[name] = f"{mixed[block]}/{branches.get(kind, branches[kind[0]])[branch]}"
    return names


def _constants(graph: memoryview) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the float32 constants of a serialized GraphDef (protocol buffers, wire format)."""
    for number, node in _fields(graph):
        if number != 1:  # GraphDef.node
            continue
        name, tensor = "", None
        for part, value in _fields(node):
            if part == 1:  # NodeDef.name
                name = bytes(memoryview(value)).decode()
            elif part == 5:  # NodeDef.attr, a map entry: key = 1, value = 2
                entry = dict(_fields(value))
                if bytes(memoryview(entry.get(1, b""))) == b"value":
                    tensor = dict(_fields(entry[2])).get(8)  # AttrValue.tensor
        if tensor is not None and (value := _float_tensor(tensor)) is not None:
            yield name, value


def _float_tensor(proto: memoryview) -> Tensor | None:
    """A TensorProto of float32 (dtype 1, tensor_shape 2, tensor_content 4, float_val 5); None for other types."""
    fields = list(_fields(proto))
    first = dict(fields)
    if first.get(1) != 1:  # DT_FLOAT
        return None
    dims = [
        size
        for number, dim in _fields(first.get(2, memoryview(b"")))
        if number == 2
        for part, size in _fields(dim)
        if part == 1
    ]
    content = first.get(4) or b"".join(bytes(memoryview(value)) for number, value in fields if number == 5)
    values = torch.frombuffer(bytearray(memoryview(content)), dtype=torch.float32)
    return values.expand(dims) if len(values) == 1 else values.view(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a serialized message: an int for varints, else bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(message, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("not a protocol buffer")
        if position + length > len(message):
            raise ValueError("truncated")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        if shift > 63:
            raise ValueError("not a protocol buffer")
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("not a protocol buffer")
