"""Residual codes: which convolution serves which scale, and the running features against their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varkd.residual import Quantizer, phi_index


def quantizer(scales: tuple[int, ...] = (1, 2, 3, 4), width: int = 3, num_phi: int = 4) -> Quantizer:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Quantizer(draw(9, width), draw(num_phi, width, width, 3, 3), draw(num_phi, width), scales)


def codes_for(quantizer: Quantizer, num_rows: int = 2) -> Tensor:
    length = sum(side * side for side in quantizer.scales)
    return torch.randint(9, (num_rows, length), generator=torch.Generator().manual_seed(1))


def test_the_released_mapping_of_ten_scales():
    """Scales 2 and 7 are ties that float64 rounding decides."""
    assert phi_index(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_index(4, 4) == [0, 1, 2, 3] and phi_index(6, 4) == [0, 0, 1, 2, 3, 3]
    assert phi_index(1, 4) == [0] and phi_index(3, 1) == [0, 0, 0]


@given(st.integers(1, 20), st.integers(1, 6))
def test_convolutions_follow_the_scales(num_scales: int, num_phi: int):
    found = phi_index(num_scales, num_phi)
    assert len(found) == num_scales and found == sorted(found) and set(found) <= set(range(num_phi))
    assert found[0] == 0 and (num_scales == 1 or found[-1] == num_phi - 1)


def test_one_scale_against_its_definition():
    """h = x / 2 + (conv x) / 2, with the convolution summed by hand."""
    tested = quantizer((3,), width=2, num_phi=1)
    codes_BL = codes_for(tested)
    entries = tested.codebook_VE[codes_BL].reshape(2, 3, 3, 2)
    padded = F.pad(entries, (0, 0, 1, 1, 1, 1))
    convolved = torch.zeros_like(entries)
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + 3, column : column + 3]
            convolved[:, row, column] = torch.einsum("bijc,ocij->bo", window, tested.weight_KEE33[0])
    expected = (entries + convolved + tested.bias_KE[0]) / 2
    (features,) = tested.features(codes_BL)
    torch.testing.assert_close(features, expected.permute(0, 3, 1, 2))


def test_features_add_up():
    tested = quantizer()
    codes_BL = codes_for(tested)
    parts = [
        tested.contribution(tested.entries(codes_Bn, scale), scale)
        for scale, codes_Bn in enumerate(tested.split(codes_BL))
    ]
    for scale, features in enumerate(tested.features(codes_BL)):
        assert features.shape == (2, 3, 4, 4)
        torch.testing.assert_close(features, torch.stack(parts[: scale + 1]).sum(0))


def test_equal_codes_stay_a_constant_map():
    """Bicubic interpolation keeps a constant; without a convolution phi halves it."""
    tested = quantizer()
    tested = replace(tested, weight_KEE33=torch.zeros_like(tested.weight_KEE33), bias_KE=torch.zeros(4, 3).double())
    for scale, side in enumerate(tested.scales):
        features = tested.add(tested.zeros(1), torch.full((1, side * side), 5), scale)
        expected = tested.codebook_VE[5].reshape(1, 3, 1, 1).expand(1, 3, 4, 4) / 2
        torch.testing.assert_close(features, expected)


def test_inputs_are_area_averages():
    features = torch.arange(32.0).reshape(1, 2, 4, 4)
    tested = quantizer((1, 2, 3, 4))
    torch.testing.assert_close(tested.next_input(features, 0), features.mean((2, 3)).unsqueeze(1))
    blocks = features.reshape(1, 2, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(tested.next_input(features, 1), blocks.flatten(2).transpose(1, 2))
    windows = [slice(0, 2), slice(1, 3), slice(2, 4)]  # 4 -> 3: windows of two, overlapping
    overlapping = torch.stack([features[:, :, r, c].mean((2, 3)) for r in windows for c in windows], dim=1)
    torch.testing.assert_close(tested.next_input(features, 2), overlapping)
    torch.testing.assert_close(tested.next_input(features, 3), features.flatten(2).transpose(1, 2))


def test_teacher_forcing_is_the_decode_of_given_codes():
    tested = quantizer()
    codes_BL = codes_for(tested)
    features, inputs = tested.zeros(2), []
    for scale, codes_Bn in enumerate(tested.split(codes_BL)[:-1]):
        features = tested.add(features, codes_Bn, scale)
        inputs.append(tested.next_input(features, scale + 1))
    assert torch.equal(tested.inputs(codes_BL), torch.cat(inputs, dim=1))
    assert tested.inputs(codes_BL).shape == (2, 29, 3)


@pytest.mark.parametrize("position", [0, 1, 4, 5, 13, 14, 29])
def test_inputs_look_back_only(position: int):
    tested = quantizer()
    codes_BL = codes_for(tested)
    changed_BL = codes_BL.clone()
    changed_BL[:, position] = (changed_BL[:, position] + 1) % 9
    scale_L = torch.arange(4).repeat_interleave(torch.tensor([1, 4, 9, 16]))
    moved_L = (tested.inputs(changed_BL) != tested.inputs(codes_BL)).any(-1).any(0)
    assert not moved_L[scale_L[1:] <= scale_L[position]].any()
    assert all(moved_L[scale_L[1:] == later].any() for later in range(int(scale_L[position]) + 1, 4))


def test_one_scale_needs_no_inputs():
    tested = quantizer((2,))
    assert tested.inputs(codes_for(tested)).shape == (2, 0, 3)


def test_autocast_changes_nothing():
    tested = quantizer()
    tested = Quantizer.of({name: value.float() for name, value in tested.tensors().items()}, tested.scales)
    codes_BL = codes_for(tested)
    exact = tested.inputs(codes_BL)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = tested.inputs(codes_BL)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, exact)
