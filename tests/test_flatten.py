"""A convolution, flattened into linear layers, is one convolution that covers the map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import assert_close
from models import Residual
from torch import Tensor, nn

import convmerge

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.flatten": lambda y: torch.flatten(y, 1),
    "flatten": lambda y: y.flatten(1),
    "view by size": lambda y: y.view(y.size(0), -1),
    "view by features": lambda y: y.view(-1, 100),
    "reshape by shape": lambda y: y.reshape(y.shape[0], -1),
    "reshape by both": lambda y: y.reshape(len(y), 5 * 5 * 4),
    "contiguous view": lambda y: y.contiguous().view(y.shape[0], -1),
    "module": nn.Flatten(),
}


class Flattening(nn.Module):
    """3→5 3×3 on 7×6, so that the linear layer sees 5×4."""

    def __init__(
        self, form: Callable[[Tensor], Tensor], *tail: nn.Module, before: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv, self.before, self.form = nn.Conv2d(3, 5, 3), before or nn.Identity(), form
        self.tail = nn.Sequential(*(tail or [nn.Linear(100, 3)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.form(self.before(self.conv(x))))


def fused(model: nn.Module, x: Tensor) -> convmerge.Result:
    """The model fused, and found to be the same function in float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    result = convmerge.fuse(model.double().eval(), x.double(), objective="macs")
    assert_close(result.model(x.double()), model(x.double()))
    return result


def one_layer(model: nn.Module, x: Tensor) -> None:
    result = fused(model, x)
    assert result.report.after is not None
    assert result.report.after.operators == {"linear": 1}, result.report.sites


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_however_it_is_flattened(form: str, batch: int) -> None:
    one_layer(Flattening(FORMS[form]), torch.randn(batch, 3, 7, 6))


TAILS: dict[str, Callable[[], list[nn.Module]]] = {
    "dropout": lambda: [nn.Dropout(), nn.Linear(100, 3)],
    "identity": lambda: [nn.Identity(), nn.Linear(100, 3)],
    "several linear layers": lambda: [nn.Linear(100, 7), nn.Dropout(), nn.Linear(7, 5), nn.Linear(5, 3)],
    "batch norm before": lambda: [nn.BatchNorm1d(100), nn.Dropout(), nn.Linear(100, 3)],
    "batch norm after": lambda: [nn.Linear(100, 3), nn.BatchNorm1d(3)],
    "residual": lambda: [nn.Linear(100, 3), Residual(nn.Linear(3, 3))],
}


@pytest.mark.parametrize("tail", TAILS)
def test_what_may_stand_around_the_linear_layer(tail: str) -> None:
    one_layer(Flattening(FORMS["module"], *TAILS[tail]()), torch.randn(2, 3, 7, 6))


def test_batch_norm_before_and_channels_last() -> None:
    model = Flattening(FORMS["torch.flatten"], before=nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 7, 6)
    one_layer(model, x)
    last = torch.channels_last
    one_layer(model.to(memory_format=last), x.to(memory_format=last))


def test_maps_of_as_many_numbers_in_another_shape_are_an_error() -> None:
    model = Flattening(FORMS["module"])
    result = fused(model, torch.randn(2, 3, 7, 6))
    assert model(torch.randn(2, 3, 6, 7).double()).shape == (2, 3)  # the original does not mind
    for shape in ((2, 3, 6, 7), (2, 6, 7, 3), (2, 7, 3, 6), (1, 6, 3, 7)):
        with pytest.raises(RuntimeError, match="multiply up to"):
            result.model(torch.randn(shape).double())


def test_a_branch_from_the_image_itself() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.skip = nn.Conv2d(3, 5, 3), nn.Linear(100, 7), nn.Linear(3 * 7 * 6, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).flatten(1)) + self.skip(x.flatten(1))

    one_layer(Skip(), torch.randn(2, 3, 7, 6))


def test_batch_norm_of_features_joins_the_linear_layer_where_the_convolution_cannot() -> None:
    tail = [nn.BatchNorm1d(100), nn.Linear(100, 3)]
    result = fused(Flattening(FORMS["module"], *tail, before=nn.ReLU()), torch.randn(2, 3, 7, 6))
    assert result.report.after is not None
    assert result.report.after.operators == {"conv": 1, "linear": 1}


def test_one_that_costs_more_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(16, 2, 5), nn.Flatten(), nn.Linear(2 * 4 * 4, 50))
    (site,) = fused(model, torch.randn(1, 16, 8, 8)).report.sites
    assert site.action == "keep" and "the MACs" in site.reason


def test_rows_that_cut_across_samples_are_no_other_size() -> None:
    """view(-1, features) runs wherever the numbers divide; that is no size that the model is made for."""
    a = nn.Sequential(Flattening(FORMS["view by features"]))
    b = nn.Sequential(Flattening(FORMS["module"]))
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 3, 7, 6)
    assert a(torch.randn(1, 3, 22, 12)).shape == (10, 3)
    verdict = convmerge.verify(a, b, x)
    assert verdict.equal and "does not accept other spatial sizes" in verdict.reason
    b[0].tail[0].weight.data[0, 0] += 0.01
    assert not convmerge.verify(a, b, x).equal
