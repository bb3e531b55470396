"""Compiled blocks compute what plain ones do, decodes do not use them, and a machine without a compiler is told so."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

import varkd
from varkd.backbones.protocol import Backbone
from varkd.progress import console
from varkd.train.compiling import compile_blocks

SIZES = {"vocab_size": 16, "num_classes": 3, "grid": (3, 3), "num_layers": 2, "dim": 16, "num_heads": 2}


def models() -> tuple[Backbone, Backbone]:
    student, teacher = (varkd.build("llamagen", SIZES, seed=seed).double() for seed in (0, 1))
    with torch.no_grad():
        for model in (student, teacher):
            model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return student, teacher.eval().requires_grad_(False)


def gradients(student: Backbone, teacher: Backbone) -> list[torch.Tensor]:
    distiller = varkd.Distiller("varkd", student, teacher, torch.eye(16), updates=10)
    batch = varkd.Batch(torch.arange(36).view(4, 9) % 16, torch.zeros(4).long(), torch.arange(4))
    loss, _ = distiller(batch)
    loss.backward()
    return [loss, *(parameter.grad for parameter in student.parameters() if parameter.grad is not None)]


def test_compiled_blocks_give_the_same_loss_and_gradients():
    """`backend="eager"` traces and guards as "inductor" does, and spares the test half a minute of C++."""
    plain, (student, teacher) = gradients(*models()), models()
    compile_blocks(student, teacher, None, backend="eager")
    assert all(block._compiled_call_impl for block in student.transformer_blocks)
    torch.testing.assert_close(gradients(student, teacher), plain, rtol=1e-10, atol=1e-12)


def test_a_machine_that_cannot_compile(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def broken(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(console, "print", lambda text, **_: said.append(text))
    student, _ = models()
    compile_blocks(student)
    assert said == ["note: train.compile has no effect, torch.compile does not work here: no C++ compiler"]
    assert not any(block._compiled_call_impl for block in student.transformer_blocks)
