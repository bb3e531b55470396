"""Which rollouts are measured, and that both orders of decoding run."""

from __future__ import annotations

import torch

from varkd.bench.loss import loss_cases
from varkd.bench.machine import Machine
from varkd.bench.rollouts import Bench, rollout_cases
from varkd.bench.sizes import sizes_for
from varkd.bench.steps import step_cases

MACHINE = Machine("x", 1, "", 1.0, 1.0, 1.0)


def test_a_gpu_gets_the_published_sizes():
    """Nothing is built before it is measured, so a machine without a GPU can list what one would run."""
    cuda = torch.device("cuda")
    sizes = sizes_for("full", cuda)
    assert (sizes.student["dim"], sizes.teacher["dim"], sizes.loss_rows) == (768, 1024, 16_384)
    assert sizes.student["vocab_size"] == 16_384 and sizes.var["num_layers"] == 16 and sizes.arpg["num_layers"] == 24
    names = [case.what for case in rollout_cases(Bench(MACHINE, cuda, sizes))]
    for batch in (1, 32, 256):
        for precision in ("fp32", "bf16"):
            assert f"LlamaGen, batch {batch}, {precision}" in names
        assert {f"LlamaGen, ZipAR window 4, batch {batch}, bf16", f"VAR, batch {batch}, bf16"} <= set(names)
        assert f"ARPG, 64 steps, batch {batch}, bf16" in names
    assert [case.what.split(",")[0] for case in step_cases(MACHINE, cuda, sizes)] == [
        "ce",
        "kd",
        "varkd",
        "GKD on student samples",
    ]
    assert [case.what.rsplit(" ", 1)[1] for case in loss_cases(MACHINE, cuda, sizes)] == [
        "bf16",
        "bf16",
        "fp32",
        "fp32",
    ]


def test_a_cpu_gets_fewer_rows_of_the_same_models():
    cpu, cuda = (sizes_for("full", torch.device(name)) for name in ("cpu", "cuda"))
    assert cpu.student == cuda.student and cpu.loss_rows == 4096 and cpu.batches == (1, 8)
