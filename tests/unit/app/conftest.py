"""Two tiny runs on the same codes: a raster model and one of any order."""

from pathlib import Path

import pytest

from tiny_runs import codes, teacher, train

__all__ = ["codes", "teacher"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("app")
    raster = train(folder / "raster", codes, "name=<b>raster</b>", "evaluation.sampler.temperature=0.85")
    return [raster, train(folder / "random", codes, "name=random", "model.family=randar")]
