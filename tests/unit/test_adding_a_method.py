"""docs/adding-a-method.md runs as it stands, and the recipe of docs/methods.md is one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from varkd.config import resolve
from varkd.distill.describe import describe_presets, explain
from varkd.distill.divergences import Divergence, ReverseKL, TargetRows
from varkd.distill.prefixes import Rollout
from varkd.methods import METHODS

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-method.md").read_text(), re.DOTALL)


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """What the names of the page stand for after all of its blocks; the table of presets is put back."""
    before = dict(METHODS)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"adding-a-method.md, block {number}", "exec", dont_inherit=True), names)
        yield names
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_the_page_runs_and_its_methods_train(page: dict[str, Any]):
    assert len(BLOCKS) == 5
    for method in (METHODS["sure_reverse"].method, page["hellinger"]):
        losses = page["train"](method, updates=3)
        assert len(losses) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses)
        assert len(set(losses)) == 3, "the weights moved"


def test_the_new_row_is_ten_lines_and_a_preset_like_any_other(page: dict[str, Any]):
    begin = BLOCKS[0].index('METHODS["sure_reverse"]')
    assert len(BLOCKS[0][begin:].strip().splitlines()) <= 10
    run = resolve({}, ["method=sure_reverse", "method.terms.srkl.divergence.alpha=0.2"])
    assert run.preset == "sure_reverse" and run.method.terms[0].divergence == type(run.method.terms[0].divergence)(0.2)
    (row,) = describe_presets({"sure_reverse": METHODS["sure_reverse"]})
    assert row["contexts"].startswith("data [the rest] + student samples, replayed")


def test_the_new_divergence_is_one(page: dict[str, Any]):
    """Against 1/2 sum (sqrt p - sqrt q)^2, with a masked outcome; 0 where the models agree; parsed by its kind."""
    divergence = page["Hellinger"]()
    generator = torch.Generator().manual_seed(1)
    s, z = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    z[:, 2] = -torch.inf
    s.requires_grad_()
    rows = TargetRows(torch.zeros(5, dtype=torch.long))
    value = divergence(s.log_softmax(1), z.log_softmax(1), rows)
    q, p = s.detach().softmax(1), z.softmax(1)
    torch.testing.assert_close(value.detach(), 0.5 * (q.sqrt() - p.sqrt()).square().sum(1))
    (gradient,) = torch.autograd.grad(value.sum(), s)
    root = (p * q).sqrt()
    torch.testing.assert_close(gradient, 0.5 * (q * root.sum(1, keepdim=True) - root))
    assert float(divergence(q.log(), q.log(), rows).abs().max()) < 1e-12
    assert TypeAdapter(Divergence | page["Hellinger"]).validate_python({"kind": "hellinger"}) == divergence
    assert "  compares: squared Hellinger distance, 1 - sum sqrt(p q)" in explain(page["hellinger"])


def test_the_house_tree_names_every_file_of_distill():
    tree = (DOCS / "architecture.md").read_text().split("```")[1]
    files = {path.stem for path in (DOCS.parent / "src" / "varkd" / "distill").glob("*.py")} - {"__init__"}
    assert [name for name in sorted(files) if not re.search(rf"\b{name}\b", tree)] == []


def test_the_recipe_of_the_methods_page_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "methods.md").read_text(), re.DOTALL)
    method = resolve(yaml.safe_load(block)).method
    assert [term.divergence for term in method.terms] == [ReverseKL()] and method.contexts == Rollout()
    assert method.terms[0].on == ("student",)
