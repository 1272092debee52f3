"""Rewrites of the whole model before merging: adopted if the function stays the same, left out otherwise."""

import copy

import pytest
import torch
from torch import nn

import convmerge
from convmerge import pipeline
from convmerge.inputs import Inputs
from convmerge.passes import Pass, Prepared
from convmerge.report import SiteReport

SITE = SiteReport("0", ("conv 3×3",), "", "merge", "a smaller one")


def _doubled(factor: float) -> Pass:
    """Scales the first layer by ``factor`` and the second by a half."""

    def run(model: nn.Module, inputs: Inputs) -> Prepared:
        assert not model.training
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for layer, scale in ((changed[0], factor), (changed[2], 0.5)):
                layer.weight *= scale
            changed[0].bias *= factor
        return Prepared(changed, inputs, (SITE,))

    return run


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7))


def _with(monkeypatch: pytest.MonkeyPatch, step: Pass) -> None:
    monkeypatch.setattr(pipeline.Options, "passes", lambda self: [("rescale", step)])


def test_a_pass_that_keeps_the_function_is_adopted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, _doubled(2.0))
    x = torch.randn(1, 3, 11, 13)
    result = convmerge.fuse(model, x)
    assert torch.equal(result.model[0].weight, model[0].weight * 2)
    assert result.report.sites[0] == SITE and len(result.report.merged()) == 2
    assert result.report.verification is not None and result.report.verification.equal
    assert convmerge.verify(model, result.model, x).equal
    assert SITE in convmerge.inspect(model, x).sites


def test_a_pass_that_changes_the_function_is_left_out(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with(monkeypatch, _doubled(1.9))
    x = torch.randn(1, 3, 11, 13)
    result = convmerge.fuse(model, x)
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert result.report.sites[0].action == "refuse" and len(result.report.merged()) == 1
    assert any(w.startswith("rescale was left out: ") for w in result.report.warnings)
    assert convmerge.verify(model, result.model, x).equal


def test_a_pass_alone_is_verified_too(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, _doubled(2.0))
    model = model[:3]
    report = convmerge.fuse(model, torch.randn(1, 3, 11, 13)).report
    assert report.verification is not None and report.verification.equal


def test_an_objective_that_does_not_exist(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="objective must be one of"):
        convmerge.inspect(model, torch.randn(1, 3, 11, 13), objective="speed")  # type: ignore[arg-type]
