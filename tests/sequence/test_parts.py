"""A row's parts, by hand."""

import torch

from fedsim.layout import Layout
from fedsim.sequence.parts import Parts

LAYOUT = Layout.of(
    [
        ("blocks.1.adapter.down", (2, 1), "adapter"),  # 0 1
        ("blocks.1.adapter.bias", (1,), "adapter"),  # 2
        ("head.weight", (2, 3), "head"),  # 3 4 5, 6 7 8
        ("head.bias", (3,), "head"),  # 9 10 11
        ("blocks.2.adapter.down", (2, 1), "adapter"),  # 12 13
        ("blocks.2.adapter.bias", (1,), "adapter"),  # 14
        ("blocks.2.lora.A", (2, 2), "adapter.A"),  # 15 ... 18
    ]
)


def test_a_part_is_a_layers_adapter_or_a_class():
    banks = [bank.tolist() for bank in Parts.of(LAYOUT).banks]
    assert banks == [
        [[0, 1, 2], [12, 13, 14]],  # of equal form: one learner for both
        [[3, 6, 9], [4, 7, 10], [5, 8, 11]],  # as many elements, but of the head
        [[15, 16, 17, 18]],
    ]


def test_or_the_row_is_one_part():
    assert [bank.tolist() for bank in Parts.of(LAYOUT, whole=True).banks] == [[list(range(19))]]


def test_rows_are_split_and_joined():
    rows, parts = torch.arange(38.0).view(2, 19), Parts.of(LAYOUT)
    split = parts.split(rows)
    assert [tuple(bank.shape) for bank in split] == [(2, 2, 3), (3, 2, 3), (1, 2, 4)]
    assert split[1][2].tolist() == [[5, 8, 11], [24, 27, 30]]
    assert torch.equal(parts.join(split), rows)
    for bank, same in zip(parts.cut(parts.arranged(rows)), split, strict=True):
        assert torch.equal(bank, same)
