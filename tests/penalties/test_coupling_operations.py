"""Units are followed through operations between two layers, or a clear error says why not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_regpen.penalties.coupling import coupled_units


class Between(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.operation, self.last = nn.Linear(6, 8), operation, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


def rotate(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones(4), torch.arange(4.0))).flatten(-2)


@pytest.mark.parametrize(
    ("operation", "width", "count"),
    [
        pytest.param(lambda x: x.flip(-1), 8, 8, id="flip along a negative dim"),
        pytest.param(lambda x: x.roll((-1, -2), (-1, 1)), 8, 8, id="negative shifts"),
        pytest.param(lambda x: F.pad(x, (-1, -1)), 6, 6, id="negative padding"),
        pytest.param(rotate, 8, 4, id="complex rotation of pairs"),
        pytest.param(lambda x: torch.cat(dim=-1, tensors=[x, x]), 16, 8, id="cat by keyword"),
        pytest.param(lambda x: x + x[:, :0].sum(1, keepdim=True), 8, 8, id="sum over no elements"),
        pytest.param(lambda x: x.relu_(), 8, 8, id="in-place change of a layer's output"),
    ],
)
def test_units_are_followed_through(operation: Callable[[Tensor], Tensor], width: int, count: int) -> None:
    sets, _ = coupled_units(Between(operation, width), torch.randn(4, 5, 6))
    assert [units.count for units in sets] == [count]


def test_addbmm_leaves_units_alone() -> None:
    sets, left = coupled_units(
        Between(lambda x: torch.addbmm(torch.zeros(5, 8), x, torch.ones(4, 8, 8))), torch.randn(4, 5, 6)
    )
    assert not sets
    assert "first" in left


def test_model_without_floating_point_output_is_refused() -> None:
    class Label(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="without a floating-point tensor"):
        coupled_units(Label(nn.ReLU()), torch.randn(4, 5, 6))
