"""Where one expert lies in what is stored: every value once, transposed, interleaved, packed."""

import pytest
import torch
from stacked_experts import StackedExperts

from ptq.model.expert_layouts import ExpertNames, Layout, Part, fused_layout, unpack_mxfp4


def test_parts_cover_every_stacked_value_once():
    for flags in ({}, {"is_transposed": True, "is_concatenated": False, "has_bias": True}):
        module = StackedExperts(**flags)
        stacked = {n: torch.arange(p.numel()).view(p.shape) for n, p in module.named_parameters()}
        values: dict[str, list[int]] = {n: [] for n in stacked}
        for _, source, _, part in fused_layout(module, ExpertNames()).parts():
            values[source] += part.take(stacked[source]).flatten().tolist()
        for name, tensor in stacked.items():
            assert sorted(values[name]) == list(range(tensor.numel())), name


def test_mxfp4_values_are_those_of_the_definition():
    blocks = torch.tensor(
        [[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8
    ).repeat(1, 4)
    scales = torch.tensor([130, 0], dtype=torch.uint8)
    values = unpack_mxfp4(blocks.view(1, 2, 16), scales.view(1, 2))
    assert values.dtype == torch.bfloat16 and values.shape == (1, 64)
    assert values[0, :8].tolist() == [0, 4, 8, 12, 16, 24, 32, 48]
    assert (values[0, 32:40].double() * 2.0**127).tolist() == [0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_a_part_is_a_view_of_its_rows_after_transposing():
    stored = torch.arange(24).view(2, 4, 3)
    assert Part(1).take(stored).data_ptr() == stored[1].data_ptr()
    assert torch.equal(Part(1, True).take(stored), stored[1].T)
    assert torch.equal(Part(1, True, (0, 3, 2)).take(stored), stored[1].T[[0, 2]])
    assert torch.equal(Part(rows=(1, 3, 1)).take(stored[0]), stored[0][1:3])


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_is_read_off_the_shapes(transposed: bool):
    module = StackedExperts(is_transposed=transposed)
    names = ExpertNames("w1", "w3", "w2")
    expected = Layout(names=names, count=2, hidden=4, intermediate=8, transposed=transposed)
    assert fused_layout(module, names) == expected
