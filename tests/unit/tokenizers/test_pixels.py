"""Gray levels as codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varkd.errors import VarkdError
from varkd.tokenizers.pixels import Pixels, PixelsConfig
from varkd.tokenizers.protocol import to_uint8, to_unit


@given(levels=st.integers(2, 256), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_round_trip_is_exact_on_levels(levels: int, height: int, width: int, seed: int):
    tokenizer = Pixels(PixelsConfig(levels, height, width))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(levels, (3, height * width), generator=generator)
    images = tokenizer.decode(codes)
    assert images.shape == (3, *tokenizer.image_shape)
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(tokenizer.encode(to_unit(to_uint8(images))), codes)  # 8 bits are enough for every level


def test_codes_are_the_rounded_grey_values_in_raster_order():
    tokenizer = Pixels(PixelsConfig(levels=5, height=2, width=2))
    images = torch.tensor([[[[-1.0, -0.45], [0.2, 1.0]]]])
    assert tokenizer.encode(images).tolist() == [[0, 1, 2, 4]]
    assert tokenizer.codebook_VE.tolist() == [[-1.0], [-0.5], [0.0], [0.5], [1.0]]


def test_has_no_weights_but_a_hash_of_its_config():
    assert not Pixels(PixelsConfig()).state_dict()
    assert Pixels(PixelsConfig()).hash == Pixels(PixelsConfig()).hash
    assert Pixels(PixelsConfig()).hash != Pixels(PixelsConfig(levels=16)).hash


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (1, 8, 8), (8, 8)])
def test_refuses_other_image_shapes(shape: tuple[int, ...]):
    with pytest.raises(VarkdError, match=r"takes images of shape \(batch, 1, 8, 8\)"):
        Pixels(PixelsConfig()).encode(torch.zeros(shape))


@pytest.mark.parametrize("value", [1.2, -3.0, float("nan")])
def test_refuses_values_outside_the_range(value: float):
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 3, 3] = value
    with pytest.raises(VarkdError, match="outside"):
        Pixels(PixelsConfig()).encode(images)


@pytest.mark.parametrize("codes", [torch.zeros(1, 63).long(), torch.full((1, 64), 17), torch.full((1, 64), -1)])
def test_refuses_other_codes(codes: torch.Tensor):
    with pytest.raises(VarkdError, match="codes"):
        Pixels(PixelsConfig()).decode(codes)


@pytest.mark.parametrize("sizes", [(1, 8, 8), (257, 8, 8), (17, 0, 8)])
def test_refuses_impossible_sizes(sizes: tuple[int, int, int]):
    with pytest.raises(VarkdError, match="pixels tokenizer"):
        PixelsConfig(*sizes)
