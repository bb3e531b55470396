"""Bounds: counted weights, cached numbers and FLOPs against closed forms, real caches and the probe's counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from varkd.bench.machine import Machine, cached_numbers, decode_weights, forward_flops, step_flops
from varkd.bench.rollouts import Decode
from varkd.bench.sizes import random_model, sizes_for
from varkd.methods import METHODS
from varkd.rollout import Sampler
from varkd.train.probe import Probe

CPU = torch.device("cpu")
SIZES = sizes_for("tiny", CPU)
LLAMAGEN: dict[str, Any] = dict(SIZES.student)
SLOW_MEMORY = Machine("CPU", 1, "", bandwidth=1.0, peak_fp32=1e30, peak_bf16=1e30)
SLOW_ARITHMETIC = Machine("CPU", 1, "", bandwidth=1e30, peak_fp32=1.0, peak_bf16=4.0)


def test_weights_of_a_llamagen():
    layer = 4 * 32 * 32 + 3 * 32 * 256
    assert decode_weights(random_model("llamagen", LLAMAGEN, CPU)) == 2 * layer + 32 * 64


@pytest.mark.parametrize("family", ["llamagen", "var", "arpg"])
def test_what_a_slot_keeps_is_what_the_cache_holds(family: str):
    sizes = {"llamagen": SIZES.student, "var": SIZES.var, "arpg": SIZES.arpg}[family]
    model = random_model(family, sizes, CPU)
    decode = Decode.of(model, 3, Sampler())
    state, _ = model.start(decode.condition, decode.plan)
    assert cached_numbers(model) * 3 * state.cache.shape[-2] == state.cache.numel()


def test_flops_are_what_the_counter_counts():
    """The probe leaves the head out of a pass, and counts attention as two products of L x L."""
    model = random_model("llamagen", LLAMAGEN, CPU)
    counted = Probe(3, 1, Sampler(), False, False, CPU).phases("llamagen", LLAMAGEN, trained=False, decodes=False)
    assert 3 * forward_flops(model) == counted.read.flops + 3 * 2 * 16 * 32 * 64


def test_flops_of_an_update_follow_from_its_passes():
    student, teacher = (random_model("llamagen", sizes, CPU) for sizes in (SIZES.student, SIZES.teacher))
    ce, kd = (METHODS[name].method.at(0.0).cost for name in ("ce", "kd"))
    own, taught = forward_flops(student), forward_flops(teacher)
    assert step_flops(ce, student, None, 5) == pytest.approx(5 * 3 * own)
    assert step_flops(kd, student, teacher, 5) == pytest.approx(5 * (3 * own + taught))


def test_a_rollout_is_bound_by_memory_or_by_arithmetic():
    model = random_model("llamagen", LLAMAGEN, CPU)
    weights, slot = decode_weights(model), 2 * 2 * 32
    moved = [weights + 6 * seen * slot for seen in range(16)]  # of 6 rows
    computed = [2 * 6 * (weights + seen * slot) for seen in range(16)]
    assert SLOW_MEMORY.rollout_seconds(model, 6, (1,) * 16, "fp32") == pytest.approx(4 * sum(moved))
    assert SLOW_MEMORY.rollout_seconds(model, 6, (1,) * 16, "bf16") == pytest.approx(2 * sum(moved))
    assert SLOW_ARITHMETIC.rollout_seconds(model, 6, (1,) * 16, "fp32") == pytest.approx(sum(computed))
    assert SLOW_ARITHMETIC.rollout_seconds(model, 6, (1,) * 16, "bf16") == pytest.approx(sum(computed) / 4)


def test_fewer_steps_read_the_weights_less_often_and_compute_as_much():
    model = random_model("arpg", SIZES.arpg, CPU)
    assert SLOW_MEMORY.rollout_seconds(model, 1, (4,) * 4, "fp32") < SLOW_MEMORY.rollout_seconds(
        model, 1, (1,) * 16, "fp32"
    )
    weights_alone = 2 * 16 * decode_weights(model)
    assert SLOW_ARITHMETIC.rollout_seconds(model, 1, (16,), "fp32") == pytest.approx(weights_alone)


def test_a_measured_machine_is_of_this_world():
    found = Machine.measure(CPU, 2**22, 128)
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.peak_fp32 < 1e15 and 1e7 < found.peak_bf16 < 1e15
    faster = replace(found, peak_bf16=2 * found.peak_fp32)
    assert faster.seconds(1.0, "fp32") == pytest.approx(2 * faster.seconds(1.0, "bf16"))
