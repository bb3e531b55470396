"""What can be known of CUDA graphs without CUDA: decodes never wait for the device, and which calls are captured.

Captured decodes themselves are compared with plain ones in tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from varkd import graphs
from varkd.backbones.protocol import Backbone
from varkd.backbones.store import FAMILIES, build
from varkd.rollout import Sampler, _Loop, _WaveLoop, rollout
from varkd.types import Condition
from varkd.world import Rng

VOCAB, ROWS = 16, 3


def toy(family: str) -> Backbone:
    sizes = {"vocab_size": VOCAB, "num_classes": 3, "num_layers": 2, "dim": 16, "num_heads": 2}
    if family != "var":
        return build(family, {**sizes, "grid": (4, 4)}, seed=0).eval()
    quantizer = {
        "codebook": torch.randn(VOCAB, 4),
        "phi.weight": torch.randn(2, 4, 4, 3, 3),
        "phi.bias": torch.zeros(2, 4),
    }
    return build(family, {**sizes, "scales": (1, 2, 3), "code_dim": 4, "num_phi": 2}, quantizer=quantizer).eval()


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that waits for a device or copies from the host, which no graph can hold."""

    waits = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "lift_fresh", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        index = args[1] if name in ("index", "index_put", "index_put_") else []
        masks = [each for each in index if isinstance(each, Tensor) and each.dtype == torch.bool]
        assert name not in self.waits and not masks, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every decode run as if it were captured, but for the graph."""
    seen: list[str] = []

    def run(model: nn.Module, kind: object, function: Any, inputs: graphs.Inputs) -> tuple[Tensor, ...]:
        hash(kind)
        plain = function(*inputs)
        with NoWaiting():
            again = function(*inputs)
        assert all(one.equal(other) for one, other in zip(plain, again, strict=True))
        seen.append(type(function).__name__)
        return plain

    monkeypatch.setattr(graphs, "available", lambda model, device: True)
    monkeypatch.setattr(graphs, "run", run)
    return seen


SAMPLERS = [Sampler(), Sampler(guidance=2.0, top_k=5, top_p=0.9, temperature=0.8), Sampler(temperature=0, guidance=1.5)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kept", [0, 7])
def test_no_decode_waits_for_the_device(family: str, sampler: Sampler, kept: int, watched: list[str]):
    model, rng, row_B = toy(family), Rng(0), torch.arange(ROWS)
    plan = sampler.plan(model, rng, row_B)
    uniform_BL, codes_BL = torch.rand(plan.order_BL.shape), torch.randint(VOCAB, plan.order_BL.shape)
    kept_BL = plan.rank_BL < torch.tensor([kept, kept // 2, kept]).unsqueeze(1)
    args = (model, Condition(torch.tensor([0, 2, 1])), plan, sampler, uniform_BL, codes_BL, kept_BL)
    samples = rollout(*args)
    assert watched == [_Loop.__name__]
    graphs.available = lambda model, device: False  # undone by the fixture's monkeypatch
    plain = rollout(*args)
    assert samples.codes_BL.equal(plain.codes_BL) and samples.logp_BL.equal(plain.logp_BL)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kept", [(0, 0, 0), (3, 9, 5), (16, 2, 0)])
def test_parallel_decodes_do_not_wait_either(guidance: float, kept: tuple[int, ...], watched: list[str]):
    """And more steps, longer prefixes and more slots than a batch needs, which graphs are given, change no code."""
    model, sampler = toy("llamagen").double(), Sampler(guidance=guidance, parallel="zipar", window=2)
    codes_BL, kept_BL = torch.randint(VOCAB, (ROWS, 16)), torch.arange(16) < torch.tensor(kept).unsqueeze(1)
    args = (
        model,
        Condition(torch.tensor([0, 2, 1])),
        model.plan(ROWS),
        sampler,
        torch.rand(ROWS, 16),
        codes_BL,
        kept_BL,
    )
    samples = rollout(*args)
    assert watched == [_WaveLoop.__name__]
    graphs.available = lambda model, device: False
    plain = rollout(*args)
    assert samples.codes_BL.equal(plain.codes_BL)
    torch.testing.assert_close(samples.logp_BL, plain.logp_BL)


class Imitation:
    """A graph on the CPU: it computes its function again from the inputs that it keeps."""

    made = 0

    def __init__(
        self, function: graphs.Function, inputs: graphs.Inputs, addresses: tuple[int, ...], beside: object
    ) -> None:
        Imitation.made += 1
        self.function, self.addresses = function, addresses

    def replay(self, inputs: graphs.Inputs) -> tuple[Tensor, ...]:
        return self.function(*inputs)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> type[Imitation]:
    monkeypatch.setattr(graphs, "_captured", Imitation)
    monkeypatch.setattr(Imitation, "made", 0)
    return Imitation


def test_the_second_call_of_a_kind_is_captured_and_weights_may_change_in_place(imitated: type[Imitation]):
    model, x = nn.Linear(2, 2), torch.rand(3, 2)
    function = lambda x: (model(x),)
    made = []
    for _ in range(4):
        assert graphs.run(model, "kind", function, (x,))[0].equal(model(x))
        made.append(imitated.made)
        with torch.no_grad():
            model.weight.add_(1)
    assert made == [0, 1, 1, 1]
    for _ in range(2):  # another shape and another kind are others
        graphs.run(model, "kind", function, (x[:2],))
        graphs.run(model, "another", function, (x,))
    assert imitated.made == 3
    graphs.release(model)
    graphs.run(model, "kind", function, (x,))
    assert imitated.made == 3


def test_weights_that_move_again_and_again_are_left_alone(imitated: type[Imitation]):
    model, x = nn.Linear(2, 2), torch.rand(3, 2)
    for _ in range(12):
        held = model.weight  # so that the new weight cannot lie where the old one did
        model.weight = nn.Parameter(held.detach().clone())
        assert graphs.run(model, "kind", lambda x: (model(x),), (x,))[0].equal(model(x))
    assert 1 < imitated.made <= 4


def test_the_number_of_graphs_is_limited(imitated: type[Imitation]):
    model, x = nn.Linear(2, 2), torch.rand(3, 2)
    for _ in range(2):
        for kind in range(40):
            graphs.run(model, kind, lambda x: (model(x),), (x,))
    assert imitated.made == 40
    assert len(graphs._MODELS[model].graphs) <= 16


def test_no_graphs_without_cuda_or_where_they_are_turned_off(monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(2, 2)
    assert not graphs.available(model, torch.device("cpu"))
    assert graphs.available(model, torch.device("cuda"))
    monkeypatch.setenv("VARKD_CUDA_GRAPHS", "0")
    assert not graphs.available(model, torch.device("cuda"))
