"""The evidence: what a model really computes, whatever its code looks like; the model stays as it is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function, Pair, assert_close, evidence_of, random, randomised, regions_of
from models import conv_bn
from torch import Tensor, nn

import convmerge
from convmerge.errors import ConvmergeError
from convmerge.evidence.capture import ROOT, capture, copy_model
from convmerge.evidence.constants import Constants
from convmerge.evidence.tracing import unmarked
from convmerge.inputs import Inputs, as_inputs
from convmerge.regions.elements import stale_readers

MAP = (2, 6, 7, 9)


def ops(model: nn.Module, *args: Any) -> list[str]:
    return [call.op for call in evidence_of(model, *args).calls.values()]


def test_modules_functions_and_methods_are_one_vocabulary() -> None:
    conv, w = nn.Conv2d(6, 5, 3), random(5, 6, 3, 3)
    forms = [
        Function(lambda m, x: m.conv(x).relu(), conv=conv),
        Function(lambda m, x: F.relu(F.conv2d(x, m.w, m.b)), w=w, b=random(5)),
        Function(lambda m, x: torch.relu(torch.conv2d(x, m.w, m.b)), w=w, b=random(5)),
        Function(lambda m, x: m.conv.forward(x).relu_(), conv=conv),
    ]
    assert [ops(form.double(), random(*MAP)) for form in forms] == [["conv2d", "relu"]] * 4


def test_arguments_have_their_schema_names_and_defaults() -> None:
    evidence = evidence_of(Function(lambda _, x: F.avg_pool2d(x, (3, 2), padding=1)), random(*MAP))
    (call,) = evidence.calls.values()
    assert call.args["kernel_size"] == [3, 2]
    assert call.args["padding"] == [1, 1]
    assert call.args["ceil_mode"] is False
    assert call.args["count_include_pad"] is True
    assert call.args["self"] in evidence.inputs


def test_writes_in_place_are_seen_under_the_plain_name() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        y = x * 2
        y += x
        y[:, 1].fill_(3)
        return F.relu(y, inplace=True)

    evidence = evidence_of(Function(forward), random(*MAP))
    seen = [(call.op, call.mutates) for call in evidence.calls.values()]
    assert seen == [("mul", False), ("add", True), ("select", False), ("fill", True), ("relu", True)]


def test_every_call_names_the_modules_it_ran_in() -> None:
    block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 5, 1)))
    evidence = evidence_of(randomised(Function(lambda m, x: m.body(x) * 2, body=block)), random(*MAP))
    stacks = {
        call.op + str(i): [f.path for f in call.stack] for i, call in enumerate(evidence.calls.values())
    }
    assert stacks == {
        "conv2d0": ["", "body", "body.0"],
        "relu1": ["", "body", "body.1", "body.1.0"],
        "conv2d2": ["", "body", "body.1", "body.1.1"],
        "mul3": [""],
    }
    assert all(call.stack[0] == ROOT for call in evidence.calls.values())


def test_a_module_called_twice_has_a_frame_for_each_call() -> None:
    model = randomised(Function(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(6, 6, 3)))
    evidence = evidence_of(model, random(*MAP))
    first, second = [call.stack[-1] for call in evidence.calls.values()]
    assert first.path == second.path == "conv"
    assert first != second
    assert evidence.signatures["conv"].calls == 2


def test_a_module_of_two_names_has_the_first_one_everywhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(6, 6, 3))
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    evidence = evidence_of(randomised(Shared()), random(*MAP))
    assert [call.path for call in evidence.calls.values()] == ["first.0", "first.0"]
    assert set(evidence.signatures) == {"", "first", "first.0"}
    assert evidence.signatures["first.0"].calls == 2


def test_signatures_tell_how_modules_are_called() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *, flip: bool = False) -> Tensor:
            return y - x if flip else x - y

    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Several(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    model = Function(
        lambda m, x: m.plain(m.two(*m.several(m.named(x=x)), flip=True)),
        two=Two(), named=Named(), several=Several(), plain=nn.ReLU(),
    )  # fmt: skip
    signatures = evidence_of(model, random(*MAP)).signatures
    assert {path: s.unary for path, s in signatures.items()} == {
        "": True, "two": False, "named": False, "several": False, "plain": True,
    }  # fmt: skip
    two = signatures["two"]
    assert [tuple(a.shape) for a in two.args] == [MAP, MAP]
    assert two.kwargs == {"flip": True}
    assert not two.args[0].any()


def test_keyword_arguments_of_the_model() -> None:
    class Keyword(nn.Module):
        def forward(self, image: Tensor, scale: Tensor | None = None, *, bias: Tensor) -> Tensor:
            return image + bias if scale is None else image * scale + bias

    x, s, b = random(*MAP), random(6, 1, 1, seed=1), random(6, 1, 1, seed=2)
    evidence = evidence_of(Keyword(), bias=b, image=x)
    assert [call.op for call in evidence.calls.values()] == ["add"]
    assert len(evidence.inputs) == 2
    evidence = capture(Keyword(), Inputs((x, s), {"bias": b}))
    assert [call.op for call in evidence.calls.values()] == ["mul", "add"]


def test_inputs_that_are_not_used_or_no_tensors() -> None:
    model = Pair(lambda _, x, y: x * 2 if y else x)
    evidence = evidence_of(model, random(*MAP), True)
    assert [call.op for call in evidence.calls.values()] == ["mul"]
    assert ops(Pair(lambda _, x, y: x * 2), random(*MAP), random(3)) == ["mul"]


def test_nested_outputs_are_all_outputs() -> None:
    model = Function(lambda _, x: {"a": [x * 2, (x + 1).relu()], "b": (x, None)})
    evidence = evidence_of(model, random(*MAP))
    named = {evidence.calls[n].op if n in evidence.calls else "input" for n in evidence.outputs}
    assert named == {"mul", "relu", "input"}


class Rewriting(nn.Module):
    """As SPAN does in eval mode: the forward sets another layer's weight and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 5, 3), nn.Conv2d(6, 5, 1)
        self.eval_conv = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.eval_conv.weight.data = self.a.weight.detach() + F.pad(self.b.weight.detach(), (1, 1, 1, 1))
        self.eval_conv.bias.data = self.a.bias.detach() + self.b.bias.detach()
        return self.eval_conv(x)


class Choosing(nn.Module):
    """Control flow on values, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
        self.head = nn.Conv2d(5, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.head(self.body(x).tanh()))
        return y.relu() if float(y.abs().sum()) > 0 else y


def test_a_model_that_export_cannot_follow_is_run() -> None:
    evidence = evidence_of(randomised(Choosing()), random(*MAP))
    assert evidence.eager
    assert [c.path for c in evidence.calls.values() if c.op == "conv2d"] == ["body.0", "head"]
    names = [name for name, _ in evidence.tensors.values()]
    assert len(names) == len(set(names))
    named = set(names)
    assert {"body.0.weight", "body.1.running_mean", "norm.running_var"} <= named


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_the_weights_that_a_model_gives_itself_are_what_is_merged(runs: int) -> None:
    model, x = randomised(nn.Sequential(Rewriting(), nn.BatchNorm2d(5))), random(*MAP)
    with torch.no_grad():
        for _ in range(runs):
            model(x)
        assert not evidence_of(model, x).eager
        result = convmerge.fuse(model, x)
        assert len(result.report.merged()) == 1
        assert not result.report.warnings
        assert_close(result.model(x), model(x))
    assert sorted(result.model.state_dict()) == ["0.bias", "0.weight"]


def test_a_model_that_chooses_by_value_is_fused_where_its_code_is_proof(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, x = randomised(Choosing()), random(*MAP)
    result = convmerge.fuse(model, x)
    assert capfd.readouterr() == ("", "")
    (site,) = result.report.merged()
    assert site.place == "body.0 … body.1"
    assert site.evidence == "static"
    assert any("one real run" in warning for warning in result.report.warnings)
    with torch.no_grad():
        assert_close(result.model(x), model(x))


@pytest.mark.parametrize("make", [Rewriting, Choosing])
def test_the_model_and_the_inputs_are_unchanged(make: type[nn.Module]) -> None:
    model, x = randomised(make()), random(*MAP)
    model.train()
    state, given = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    flags, names = {m: m.training for m in model.modules()}, [n for n, _ in model.named_modules()]
    evidence_of(model, x)
    assert torch.equal(x, given)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {m: m.training for m in model.modules()} == flags
    assert [n for n, _ in model.named_modules()] == names
    assert not any(m._forward_hooks for m in model.modules())


def test_a_forward_that_changes_its_input_leaves_the_callers_alone() -> None:
    model, x = Function(lambda _, x: x.mul_(2).add_(1)), random(*MAP)
    given = x.clone()
    evidence = evidence_of(model, x)
    assert torch.equal(x, given)
    assert [(c.op, c.mutates) for c in evidence.calls.values()] == [("mul", True), ("add", True)]


def test_a_model_that_does_not_run_is_an_error_with_its_message() -> None:
    with pytest.raises(ConvmergeError, match=r"does not run on .*2×4×7×9.*expected input") as caught:
        evidence_of(nn.Conv2d(6, 5, 3).double(), random(2, 4, 7, 9))
    assert caught.value.hint is not None and "--input" in caught.value.hint


def test_a_model_that_runs_but_cannot_be_followed_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("what a tracer says")

    monkeypatch.setattr("convmerge.evidence.capture._export", fail)
    monkeypatch.setattr("convmerge.evidence.capture._run", fail)
    with pytest.raises(ConvmergeError, match=r"captured by torch\.export: ValueError: what") as caught:
        evidence_of(nn.Conv2d(6, 5, 3).double(), random(2, 6, 7, 9))
    assert caught.value.hint is not None and "itself runs" in caught.value.hint


def test_a_copy_shares_no_memory_and_takes_computed_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU())
    model[0].cached = model[0].weight * 2  # type: ignore[assignment]
    copied = copy_model(model)
    storages = {t.data_ptr() for t in model.state_dict().values()}
    assert not storages & {t.data_ptr() for t in copied.state_dict().values()}
    assert torch.equal(copied[0].cached, model[0].cached)  # type: ignore[arg-type]
    assert model[0].cached.grad_fn is not None


# --- Writes through other names -----------------------------------------------------------------------------


def through_a_view(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).add_(1)
    return y * 3


def through_the_base(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(y.shape)
    y.mul_(5)
    return view * 3


def through_a_flatten(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    flat = y.flatten(1)
    flat[:, 0] = 7
    return y * 3


def the_result_of_a_write(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    y = y.add_(1)
    return y * 3


def before_the_write(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y * 3
    y.add_(1)
    return z


def a_copy(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y.clone()
    z[:, 0] = 0
    return y * 3


@pytest.mark.parametrize(
    ("forward", "stale"),
    [
        (through_a_view, True), (through_the_base, True), (through_a_flatten, True),
        (the_result_of_a_write, False), (before_the_write, False), (a_copy, False),
    ],
)  # fmt: skip
def test_readers_of_memory_that_was_written_to_since(forward: Any, stale: bool) -> None:
    model, x = Function(forward), random(*MAP)
    evidence = evidence_of(model, x)
    found = stale_readers(evidence, Constants(evidence))
    assert ("mul" in {evidence.calls[node].op for node in found}) == stale
    _, regions = regions_of(model, x)
    assert ("reads memory that was written to in between" in regions.refused.values()) == stale


@pytest.mark.parametrize("forward", [through_a_view, through_the_base, through_a_flatten, a_copy])
def test_such_models_are_still_right_when_fused(forward: Any) -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1)
    model = randomised(
        Function(lambda m, x: m.norm(m.conv(forward(m, x))), conv=conv, norm=nn.BatchNorm2d(6))
    )
    result = convmerge.fuse(model, random(*MAP))
    for seed in range(3):
        x = random(*MAP, seed=seed)
        with torch.no_grad():
            assert_close(result.model(x.clone()), model(x.clone()))


def test_signature_of_capture_takes_any_kind_of_inputs() -> None:
    assert list(inspect.signature(capture).parameters) == ["model", "inputs"]
    x = random(*MAP)
    for given in (x, (x,), [x], {"x": x}, Inputs((x,), {})):
        assert len(capture(Function(lambda _, x: x * 2), as_inputs(given)).calls) == 1


def test_numbers_taken_from_values_are_no_constants() -> None:
    """Seen on the example inputs alone, the factor is a plain number."""

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.body = (
                nn.Conv2d(6, 5, 3),
                nn.BatchNorm2d(5),
                nn.Sequential(*conv_bn(5, 4, 1)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.norm(self.conv(x) * float(x.abs().max())).relu())

    model, x = randomised(Scaling()), random(*MAP)
    result = convmerge.fuse(model, x)
    assert [site.place for site in result.report.merged()] == ["body.0 … body.1"]
    assert not any("dropped" in warning for warning in result.report.warnings)
    other = 3 * random(*MAP, seed=1)
    with torch.no_grad():
        assert_close(result.model(other), model(other))


class Adapter(nn.Module):
    """A low-rank update with dropout, and casts to what the values are already, on its way."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside)
        self.a, self.b = nn.Linear(inside, 2, bias=False), nn.Linear(2, outside, bias=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        y = self.base(x)
        return (y + self.b(self.a(self.drop(x.to(self.a.weight.dtype))))).to(dtype)


def test_what_returns_its_argument_ties_nothing_together() -> None:
    heads = {"first": Adapter(7, 5), "second": Adapter(7, 11), "plain": nn.Linear(7, 3)}
    model = randomised(Function(lambda m, x: (m.first(x), m.second(x), m.plain(x)), **heads))
    result, x = convmerge.fuse(model, random(2, 13, 7)), random(2, 13, 7)
    (site,) = result.report.merged()  # both adapters, as one layer: nothing is left of the updates
    assert "first" in site.place and "second" in site.place
    assert sum(p.numel() for p in result.model.parameters()) == sum(
        layer.weight.numel() + layer.bias.numel() for layer in (heads["first"].base, heads["second"].base)
    ) + sum(p.numel() for p in heads["plain"].parameters())
    for fused, original in zip(result.model(x), model(x), strict=True):
        assert_close(fused, original)


def test_tracing_leaves_no_marks() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.ones(1, 6, 1, 1)
            self.register_buffer("shift", torch.ones(1, 6, 1, 1))
            self.conv = nn.Conv2d(6, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean.type_as(x)
            self.shift = self.shift * 1.0
            return self.conv((x - self.mean - self.shift) * 3)

    module = Remembering()
    before = dict(vars(module)), dict(module._buffers)
    with unmarked(module):
        torch.fx.symbolic_trace(module)
        assert not isinstance(module.mean, Tensor)
    assert (dict(vars(module)), dict(module._buffers)) == before
