"""What changes in a fused model, and what must not: the smallest module, on a copy, with everything kept."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from captured import Function, assert_close, random, randomised
from models import conv_bn
from torch import Tensor, fx, nn

import convmerge
from convmerge.api import Result

MAP = (2, 6, 9, 11)


def fused(model: nn.Module, x: Tensor, **options: Any) -> Result:
    """Fuse, and check that the result is the same function and the caller's model the same bits."""
    flags = {m: m.training for m in model.modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    storages = {k: v.data_ptr() for k, v in model.state_dict().items()}
    attributes = {m: set(vars(m)) for m in model.modules()}
    given = x.clone()
    result = convmerge.fuse(model, x, **options)
    after = model.state_dict()
    assert torch.equal(x, given)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert {k: v.data_ptr() for k, v in after.items()} == storages
    assert {m: m.training for m in model.modules()} == flags
    assert {m: set(vars(m)) for m in model.modules()} == attributes
    mine = {v.data_ptr() for v in after.values() if v.numel()}
    assert not mine & {v.data_ptr() for v in result.model.state_dict().values() if v.numel()}
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert_close(result.model(x.clone()), reference(x.clone()))
    return result


def reasons(result: Result) -> str:
    return "; ".join(site.reason for site in result.report.sites if site.action != "merge")


# --- What stays ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """With attributes, a method, and parts that no merge touches."""

    version = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(6, 5, 3)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7)
        self.labels = ["a", "b"]
        self.register_buffer("table", torch.arange(5.0))

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x)).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = self.norm(self.attention(y, y, y)[0] + y) + self.table.tanh() * y
        return self.head(y).softmax(-1)


def test_class_attributes_methods_and_names_stay() -> None:
    model, x = randomised(Net()), random(*MAP)
    result = fused(model, x).model
    assert type(result) is Net
    assert result.labels == ["a", "b"]
    assert result.features(x).shape == model.features(x).shape
    before, after = model.state_dict(), result.state_dict()
    assert [k for k in before if not k.startswith("stem")] == [k for k in after if not k.startswith("stem")]
    assert {k for k in after if k.startswith("stem")} == {"stem.0.weight", "stem.0.bias"}
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("stem"))


def test_the_smallest_module_is_what_changes() -> None:
    model = randomised(
        nn.Sequential(models.dbb(6, 6), nn.Sequential(models.acnet(6, 6), models.Residual(nn.Tanh())))
    )
    result = fused(model, random(*MAP)).model
    block = ["Sequential", "Conv2d", "ReLU"]
    kinds = [type(m).__name__ for m in result.modules()]
    assert kinds == ["Sequential", *block, "Sequential", *block, "Residual", "Tanh"]
    assert not any(isinstance(m, fx.GraphModule) for m in result.modules())


def test_a_module_of_any_class_that_is_affine_becomes_one_plain_layer() -> None:
    for make in (
        lambda: models.DoConv(6, 9),
        lambda: models.SpanConv(6, 5),
        lambda: models.Sum(*conv_bn(6, 6, 1)),
    ):
        assert type(fused(randomised(make()), random(*MAP)).model) is nn.Conv2d
    assert type(fused(randomised(models.Lora(11, 7)), random(2, 3, 11)).model) is nn.Linear


def test_with_nothing_to_merge_an_unchanged_copy_comes_back() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)))
    result = fused(model, random(*MAP))
    assert not result.report.merged()
    assert list(result.model.state_dict()) == list(model.state_dict())


def test_plain_attributes_that_a_parent_may_read_stay() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rep = models.Sum(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1))
            self.rep.stride, self.rep.names, self.rep.width = (1, 1), ["a"], 6  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.rep(x).relu() * self.rep.width

    result = fused(randomised(Block()), random(*MAP)).model
    assert type(result.rep) is nn.Conv2d
    assert result.rep.width == 6
    assert result.rep.names == ["a"]
    assert result.rep.stride == (1, 1)


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(
        OrderedDict(conv=nn.Conv2d(6, 5, 3), norm=nn.BatchNorm2d(5), act=nn.ReLU(), last=nn.Conv2d(5, 4, 1))
    ),
    "module list": lambda: Function(
        lambda m, x: [x := part(x) for part in m.parts][-1],
        parts=nn.ModuleList([nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]),
    ),
    "module dict": lambda: Function(
        lambda m, x: m.parts["act"](m.parts["norm"](m.parts["conv"](x))),
        parts=nn.ModuleDict({"conv": nn.Conv2d(6, 5, 3), "norm": nn.BatchNorm2d(5), "act": nn.ReLU()}),
    ),
    "indexed sequential": lambda: Function(
        lambda m, x: m.parts[2](m.parts[1](m.parts[0](x))),
        parts=nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
    ),
    "sliced sequential": lambda: Function(
        lambda m, x: m.parts[2:](m.parts[:2](x)),
        parts=nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name: str) -> None:
    model, x = randomised(CONTAINERS[name]()), random(*MAP)
    result = fused(model, x)
    assert [site.operators for site in result.report.merged()] == [("conv 3×3", "batch_norm")]
    assert models.operators(result.model, x).get("batch_norm", 0) == 0
    weights = [k for k in model.state_dict() if "conv" in k or ".0." in k]
    assert set(result.model.state_dict()) >= {k for k in weights if k.endswith("weight")}


def test_modules_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rep = models.Sum(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1))
            self.conv, self.norm = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(input=self.rep(x=x).relu()))

    x = random(*MAP)
    result = fused(randomised(Named()), x)
    assert models.operators(result.model, x) == {"conv": 2, "relu": 1}


def test_a_model_called_by_keyword_still_can_be() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, image: Tensor, flip: bool = False) -> Tensor:
            y = (self.a(image) + self.b(image)).relu()
            return y.flip(3) if flip else y

    model, x = randomised(Model()), random(*MAP)
    result = convmerge.fuse(model, {"image": x})
    with torch.no_grad():
        assert_close(result.model(image=x), model(image=x))
        assert_close(result.model(x), model(x))


def test_modules_that_keep_tensors_from_forward() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.last = y
            return self.norm(y)

    model, x = randomised(nn.Sequential(Keeping(), nn.ReLU())), random(*MAP)
    with torch.no_grad():
        model(x)
    kept = model[0].last
    result = fused(model, x)
    assert model[0].last is kept
    assert_close(result.model(x), model(x))


# --- Properties of the new layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = randomised(
        nn.Sequential(conv_bn(6, 5, 3), nn.ReLU(), models.Sum(nn.Conv2d(5, 5, 1), nn.Identity()))
    )
    result = convmerge.fuse(model.to(dtype), random(*MAP).to(dtype))
    assert len(result.report.merged()) == 2, result.report.sites
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_requires_grad_stays() -> None:
    model = randomised(nn.Sequential(conv_bn(6, 5, 3), nn.ReLU(), conv_bn(5, 4, 1)))
    model[0].requires_grad_(False)
    result = fused(model, random(*MAP)).model
    assert [p.requires_grad for p in result.parameters()] == [False, False, True, True]
    result(random(*MAP)).sum().backward()
    assert result[2][0].weight.grad is not None
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in result.parameters())


def test_channels_last_stays() -> None:
    model = randomised(nn.Sequential(conv_bn(6, 5, 3), nn.ReLU())).to(memory_format=torch.channels_last)
    x = random(*MAP).to(memory_format=torch.channels_last)
    result = fused(model, x).model
    assert result[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert result(x).is_contiguous(memory_format=torch.channels_last)


def test_train_mode_is_said_and_written_as_eval() -> None:
    model = randomised(nn.Sequential(conv_bn(6, 5, 3), nn.Dropout(0.5), nn.Conv2d(5, 4, 1))).train()
    result = fused(model, random(*MAP))
    assert model.training
    assert not any(m.training for m in result.model.modules())
    assert any("train mode" in warning for warning in result.report.warnings)


def test_the_fused_model_can_be_fused_copied_and_exported() -> None:
    model, x = randomised(nn.Sequential(models.repvgg(6, 6), models.ecb(6, 6))), random(*MAP)
    result = fused(model, x).model
    assert not convmerge.check(result, x).merged()
    again = convmerge.fuse(result, x)
    with torch.no_grad():
        assert torch.equal(again.model(x), result(x))
        assert torch.equal(copy.deepcopy(result)(x), result(x))
        assert_close(torch.export.export(result, (x,)).module()(x), model(x))


# --- Refusals -----------------------------------------------------------------------------------------------


def test_hooks_are_not_lost() -> None:
    seen: list[Tensor] = []
    model = randomised(nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *conv_bn(5, 4, 1)))
    model[0].register_forward_hook(lambda m, args, y: seen.append(y))
    result = convmerge.fuse(model, random(*MAP))
    assert "0 has a hook, which would be lost" in reasons(result)
    assert len(result.report.merged()) == 1
    seen.clear()
    result.model(random(*MAP))
    assert [tuple(y.shape) for y in seen] == [(2, 5, 7, 9)]


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(11, 7, bias=False), nn.Linear(11, 7, bias=False)
            self.decoder.weight = self.encoder.weight
            self.norm = nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.encoder(x)).relu() + self.decoder(x * x)

    result = fused(randomised(Tied()), random(5, 11))
    assert "coder.weight is used elsewhere too" in reasons(result)
    assert result.model.encoder.weight is result.model.decoder.weight


def test_a_weight_that_the_code_reads_elsewhere_stays() -> None:
    model = randomised(
        Function(
            lambda m, x: m.norm(m.lin(x)).relu() @ m.lin.weight, lin=nn.Linear(11, 7), norm=nn.BatchNorm1d(7)
        )
    )
    assert "lin.weight is used elsewhere too" in reasons(fused(model, random(5, 11)))


def test_a_computed_weight_that_the_code_reads_elsewhere_stays() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Linear(11, 7))
    model = randomised(
        Function(lambda m, x: m.norm(m.lin(x)).relu() @ m.lin.weight, lin=conv, norm=nn.BatchNorm1d(7))
    )
    assert "is used elsewhere too" in reasons(fused(model, random(5, 11)))
    do, norm = models.DoConv(6, 6), nn.BatchNorm2d(6)
    model = randomised(Function(lambda m, x: m.norm(m.do(x)).relu() * m.do.W.mean(), do=do, norm=norm))
    assert "do.W is used elsewhere too" in reasons(fused(model, random(*MAP)))


def test_a_buffer_that_two_replaced_modules_share_is_no_tie() -> None:
    first, second = models.DoConv(6, 6), models.DoConv(6, 6)
    second.D_diag = first.D_diag
    result = fused(randomised(nn.Sequential(first, nn.ReLU(), second)), random(*MAP))
    assert [type(m).__name__ for m in result.model] == ["Conv2d", "ReLU", "Conv2d"]


def test_a_module_called_twice_with_different_neighbours() -> None:
    model = randomised(
        Function(
            lambda m, x: m.norm(m.conv(x)).relu() + m.conv(x.tanh()),
            conv=nn.Conv2d(6, 5, 3), norm=nn.BatchNorm2d(5),
        )
    )  # fmt: skip
    result = fused(model, random(*MAP))
    assert not result.report.merged()
    assert "called 2 times with different neighbours" in reasons(result) or "used elsewhere" in reasons(
        result
    )


def test_a_module_called_twice_with_the_same_neighbours() -> None:
    model = randomised(Function(lambda m, x: m.body(m.body(x).tanh()), body=nn.Sequential(*conv_bn(6, 6, 1))))
    result = fused(model, random(*MAP))
    assert len(result.report.merged()) == 2
    assert models.operators(result.model, random(*MAP)) == {"conv": 2}


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*conv_bn(6, 6, 1))
            self.alias = self.body
            self.first = self.body[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.body(x).relu())

    result = fused(randomised(Aliased()), random(*MAP)).model
    assert result.alias is result.body
    assert result.first is result.body[0]


def test_a_value_that_is_returned_as_well_stays() -> None:
    model = randomised(
        Function(
            lambda m, x: torch.cat([y := m.conv(x), m.norm(y)]),
            conv=nn.Conv2d(6, 5, 3),
            norm=nn.BatchNorm2d(5),
        )
    )
    assert not fused(model, random(*MAP)).report.merged()


def test_code_that_cannot_be_traced_is_a_reason() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            for row in x:
                y = y + row.relu()
            return y

    result = fused(randomised(Loop()), random(*MAP))
    assert "the code of Loop cannot be traced" in reasons(result)


def test_code_that_changes_its_input_between_branches() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        a = m.a(y)
        y.mul_(2)
        return (a + m.b(y)).relu()

    model = Function(forward, a=nn.Conv2d(6, 6, 3, padding=1), b=nn.Conv2d(6, 6, 1))
    fused(randomised(model), random(*MAP))


@pytest.mark.parametrize("back", ["reshape_as", "view_as"])
def test_a_value_that_is_read_for_its_shape_too_merges(back: str) -> None:
    """LeViT's norm of tokens. The layer must not stand where the shape that is read becomes another one."""
    model = randomised(
        Function(
            lambda m, x: getattr(m.norm((y := m.lin(x)).flatten(0, 1)), back)(y).relu(),
            lin=nn.Linear(11, 7, bias=False),
            norm=nn.BatchNorm1d(7),
        )
    )
    result = fused(model, random(1, 5, 11))
    assert not result.report.warnings
    assert isinstance(result.model.lin, nn.Linear) and isinstance(result.model.norm, nn.Identity)
    other = random(3, 4, 11)
    assert_close(result.model(other), model(other))


def test_a_value_that_another_one_is_expanded_to_merges() -> None:
    model = randomised(
        Function(
            lambda m, x: x.mean((2, 3), keepdim=True).expand_as(y := m.conv(x)).tanh() + m.norm(y).relu(),
            conv=nn.Conv2d(6, 6, 3),
            norm=nn.BatchNorm2d(6),
        )
    )
    result = fused(model, random(*MAP))
    assert "batch_norm" not in models.operators(result.model, random(*MAP)), reasons(result)


# --- Files --------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
sys.modules["convmerge"] = None  # importing it is an error
torch.set_num_threads(1)
model = torch.load(sys.argv[1], weights_only=False)
x, y = torch.load(sys.argv[2])
assert torch.equal(model(x), y), "another result"
"""


def in_a_fresh_process(model: nn.Module, x: Tensor, folder: Path) -> None:
    torch.save(model, folder / "model.pt")
    with torch.no_grad():
        torch.save((x, model(x)), folder / "data.pt")
    command = [sys.executable, "-c", LOAD, str(folder / "model.pt"), str(folder / "data.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr


def test_rewritten_code_loads_without_convmerge(tmp_path: Path) -> None:
    """models.Sesr has code of its own around its merged branches, which becomes a GraphModule."""
    model, x = randomised(nn.Sequential(models.Sesr())), random(1, 1, 9, 11)
    result = fused(model, x).model
    assert any(isinstance(m, fx.GraphModule) for m in result.modules())
    in_a_fresh_process(result, x, tmp_path)


def test_plain_layers_load_without_convmerge(tmp_path: Path) -> None:
    model, x = randomised(nn.Sequential(models.dbb(6, 5), models.DoConv(5, 5))), random(*MAP)
    result = fused(model, x).model
    assert {type(m).__module__.split(".")[0] for m in result.modules()} == {"torch"}
    in_a_fresh_process(result, x, tmp_path)


def test_the_code_of_a_rewritten_module_runs_at_other_sizes() -> None:
    model, x = randomised(models.Sesr()), random(1, 1, 9, 11)
    result = fused(model, x).model
    for shape in ((3, 1, 14, 7), (1, 1, 6, 6)):
        other = random(*shape)
        with torch.no_grad():
            assert_close(result(other), model(other))


def test_a_copy_of_a_traced_module_keeps_what_is_read_off_it() -> None:
    """torch's own deepcopy of a GraphModule drops it, and the check of the whole model works on copies."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resolution = (5, 7)
            self.left, self.right = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.left(x) + self.right(x), 1)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            assert self.block.resolution == (5, 7)
            return self.block(x).relu()

    result = convmerge.fuse(Reader().double(), torch.randn(1, 3, 5, 7, dtype=torch.float64))
    assert result.report.merged() and result.report.verification is not None
    assert result.report.verification.equal and not result.report.warnings[1:]
    assert isinstance(result.model.block, torch.fx.GraphModule)


def test_traced_modules_keep_plain_attributes_when_copied() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.resolution = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), (7, 9)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.norm(2 * self.conv(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x)
            return y.flatten(2) if tuple(x.shape[2:]) == self.attention.resolution else y

    x = random(*MAP)
    result = fused(randomised(Block()), x).model
    assert isinstance(result.attention, torch.fx.GraphModule)
    copied = copy.deepcopy(copy.deepcopy(result))
    assert torch.equal(copied(x), result(x))


def test_traced_modules_with_absent_arguments_can_be_saved() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor, skip: Tensor | None = None, scale: float = 2.0) -> Tensor:
            y: Tensor = self.norm(scale * self.conv(x))
            return y.relu() if skip is None else y.relu() + skip

    model, x = randomised(nn.Sequential(Decoder())), random(*MAP)
    result = fused(model, x).model
    assert isinstance(result[0], fx.GraphModule)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), result(x))
    with pytest.raises(AssertionError, match="skip"):
        again[0](x, x)


class Rotation(nn.Module):
    """A block-diagonal rotation of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], 3, 2)
        return torch.einsum("...rk,rkc->...rc", blocks, self.weight).reshape(x.shape)


class Rotated(nn.Module):
    """Orthogonal fine-tuning: the code around the rotation reads its weight's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation, self.base = Rotation(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(self.rotation(x.to(self.rotation.weight.dtype)))
        return y


def test_a_module_whose_weight_is_read_by_name_goes_with_the_code_that_reads_it() -> None:
    model, x = randomised(nn.Sequential(Rotated(), nn.ReLU(), nn.Linear(5, 3))), random(2, 7, 6)
    result = fused(model, x)
    assert len(result.report.merged()) == 1
    assert not result.report.warnings
    assert type(result.model[0]) is nn.Linear
    assert_close(result.model(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.head(m.conv(x.relu()).view(x.size(0), -1)).relu(),
        lambda m, x: m.head(m.conv(x.relu()).reshape(x.shape[0], x.shape[1] * 4)).relu(),
    ],
)
def test_sizes_that_the_code_looks_at_vanish_with_their_only_reader(forward: Callable[..., Any]) -> None:
    layers = {"conv": nn.Conv2d(5, 10, 3), "head": nn.Linear(20, 3)}
    result = fused(randomised(Function(forward, **layers)), random(2, 5, 3, 4))
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in result.model.modules()) == 1
