"""Which codes look alike."""

from __future__ import annotations

import torch

from varkd.distill.neighbors import nearest_codes

VOCAB = 12
CODEBOOK_VE = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_nearest_codes_in_any_chunking_with_the_code_first():
    squared_VV = (CODEBOOK_VE.unsqueeze(1) - CODEBOOK_VE).square().sum(2)
    for chunk_rows in (1, 5, 100):
        index_Vn, squared_Vn = nearest_codes(CODEBOOK_VE, 4, chunk_rows)
        assert torch.equal(index_Vn, squared_VV.argsort(1)[:, :4])
        torch.testing.assert_close(squared_Vn, squared_VV.sort(1).values[:, :4], rtol=1e-9, atol=1e-12)
    twins = torch.cat([CODEBOOK_VE[:3], CODEBOOK_VE[:3]])
    index_Vn, squared_Vn = nearest_codes(twins, 2)
    assert index_Vn[:, 0].tolist() == list(range(6)) and squared_Vn.max() < 1e-12
    assert nearest_codes(CODEBOOK_VE, 99)[0].shape == (VOCAB, VOCAB)
