"""The modules that hold what shrinks with channels: which may change, and how they are changed."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn.utils import parametrize, prune

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, Evidence
from convmerge.evidence.constants import Constants
from convmerge.passes.channels.alignment import Alignment, Lanes, Mix


@dataclass(frozen=True)
class Place:
    """Where a constant is registered: the path of a module and the name of an attribute of it."""

    path: str
    name: str


# Layers whose forward follows the shapes of their parameters and the attributes that Edits sets.
SHRINKABLE = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
)


@dataclass(eq=False)
class Owners:
    """Which constants of a model belong to one module and are read by one call alone.

    Attributes:
        only, skip: globs on module paths; others, or these, are left as they are.
        trusting: whether code that is not torch's is taken to follow the shapes of its own parameters.
        trusted: whether that was made use of.
    """

    model: nn.Module
    evidence: Evidence
    constants: Constants
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    trusting: bool = True
    trusted: bool = False
    _hooked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        registered: Counter[int] = Counter()
        storage: Counter[int] = Counter()
        for path, module in self.model.named_modules():
            tensors = [*module._parameters.values(), *module._buffers.values()]
            registered.update(id(t) for t in tensors if t is not None)
            storage.update(t.data_ptr() for t in tensors if t is not None and t.numel())
            if _has_hooks(module):
                self._hooked.add(path)
        self._registered, self._storage = registered, storage

    def watched(self, call: Call) -> str | None:
        """Why a call must see all channels: a hook sees it, or the user wants its layer left alone."""
        if self._hooked:
            for frame in call.stack:
                if frame.path in self._hooked and self._crosses(call, frame.key):
                    return f"{frame.path or 'the model'} has hooks"
        constant = [n for n in call.node.all_input_nodes if n in self.constants]
        if constant and not self._allowed(call.path):
            return "it was to be left as it is"
        return None

    def _crosses(self, call: Call, key: str) -> bool:
        others = [n for n in (*call.node.users, *call.node.all_input_nodes) if n not in self.constants]
        calls = [self.evidence.calls[n] for n in others if n in self.evidence.calls]
        inside = [any(frame.key == key for frame in other.stack) for other in calls]
        return len(calls) < len(others) or not all(inside)

    def _allowed(self, path: str) -> bool:
        return (not self.only or _matches(path, self.only)) and not _matches(path, self.skip)

    def place(self, call: Call, node: Node) -> Place:
        """Where a constant that ``call`` reads is registered. Raises Refusal where it must not change."""
        if node in self.evidence.tensors:
            return self._direct(call, node)
        return self._computed(call, node)

    def _direct(self, call: Call, node: Node) -> Place:
        name = self.evidence.tensors[node][0]
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        tensor = module._parameters.get(attribute, module._buffers.get(attribute))
        if tensor is None:
            raise Refusal(f"{name} is no parameter or buffer")
        if set(node.users) != {call.node}:
            raise Refusal(f"{name} is read more than once")
        if self._shared(tensor):
            raise Refusal(f"{name} is shared")
        if _base(module).__module__.startswith("torch.nn.") and not isinstance(module, SHRINKABLE):
            raise Refusal(f"a {type(module).__name__} keeps its size")
        if not isinstance(module, SHRINKABLE):
            if not self.trusting:
                raise Refusal(f"the code of {type(module).__name__} relies on the size of {name}")
            self.trusted = True
        return Place(path, attribute)

    def _shared(self, tensor: Tensor) -> bool:
        return self._registered[id(tensor)] > 1 or (
            tensor.numel() > 0 and self._storage[tensor.data_ptr()] > 1
        )

    def _computed(self, call: Call, node: Node) -> Place:
        name = next((key for key, value in call.args.items() if value is node), "")
        module = self.model.get_submodule(call.path)
        if not is_masked(module, name):
            raise Refusal(f"the {name or 'constant'} is computed in the model's code")
        if not _base(module).__module__.startswith("torch.nn.modules."):
            raise Refusal(f"{_base(module).__name__} may do more with its {name} than its pruned form shows")
        signature = self.evidence.signatures.get(call.path)
        if signature is None or signature.calls != 1:
            raise Refusal(f"{call.path} is called more than once")
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current in self.evidence.tensors:
                source = self.evidence.tensors[current][0]
                if not source.startswith(f"{call.path}."):
                    raise Refusal(f"its {name} is computed from {source}")
                if self._shared(self._tensors[source]):
                    raise Refusal(f"{source} is shared")
            new = [n for n in current.all_input_nodes if n not in seen]
            seen.update(new)
            pending.extend(new)
        return Place(call.path, name)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        named.update(self.model.named_buffers(remove_duplicate=False))
        return named


def _matches(path: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*") for glob in globs)


def _has_hooks(module: nn.Module) -> bool:
    """Whether code of others runs with the module: pruning's own hooks do not count."""
    before = [h for h in module._forward_pre_hooks.values() if not isinstance(h, prune.BasePruningMethod)]
    return bool(before or module._forward_hooks)


def _base(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what torch.nn.utils.parametrize put before it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def is_masked(module: nn.Module, name: str) -> bool:
    """Whether an attribute is computed by torch.nn.utils.prune or torch.nn.utils.parametrize."""
    return pruned(module, name) or parametrize.is_parametrized(module, name)


def pruned(module: nn.Module, name: str) -> bool:
    """Whether a mask of torch.nn.utils.prune lies on an attribute."""
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == name for h in hooks)


def protect(alignment: Alignment, owners: Owners) -> None:
    """Fix the channels of everything that cannot shrink with them."""
    for step in alignment.steps.values():
        try:
            if isinstance(step, Lanes):
                for slot in step.slots:
                    owners.place(step.call, slot.node)
                _check_groups(owners, step)
            elif isinstance(step, Mix):
                for node in (step.weight, *([step.bias] if step.bias is not None else [])):
                    owners.place(step.call, node)
                _check_groups(owners, step)
        except Refusal as refusal:
            for slot in step.slots if isinstance(step, Lanes) else ():
                alignment.fix(slot.ids, refusal.reason)
            if isinstance(step, Mix):
                alignment.fix(step.inputs.ids, refusal.reason)
                alignment.fix(step.outputs.ids, refusal.reason)


def _check_groups(owners: Owners, step: Lanes | Mix) -> None:
    """A grouped layer must say in an attribute how many groups it has."""
    groups = step.call.args.get("groups", 1)
    constants = [step.weight] if isinstance(step, Mix) else [slot.node for slot in step.slots]
    if groups == 1 or not constants:
        return
    node = constants[0]
    module = owners.model.get_submodule(owners.place(step.call, node).path)
    if getattr(module, "groups", None) != groups:
        raise Refusal("its code does not say where the number of groups comes from")


def can_shift(owners: Owners, mix: Mix) -> bool:
    """Whether a bias can be given to a layer, or it has one."""
    if mix.bias is not None:
        return True
    try:
        module = owners.model.get_submodule(owners.place(mix.call, mix.weight).path)
    except Refusal:
        return False
    return module._parameters.get("bias", 0) is None


def unmask(module: nn.Module) -> None:
    """Make plain parameters of what pruning and parametrizations compute. Leaves shared tensors unchanged."""
    values = {name: getattr(module, name) for name in masked_names(module)}
    trainable = any(p.requires_grad for p in module.parameters())
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod):
            # What lies there is that of the last run.
            values[hook._tensor_name] = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            del module._forward_pre_hooks[key]
            module._parameters.pop(f"{hook._tensor_name}_orig", None)
            module._buffers.pop(f"{hook._tensor_name}_mask", None)
            module.__dict__.pop(hook._tensor_name, None)
    if parametrize.is_parametrized(module):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module._parameters[name] = nn.Parameter(value.detach().clone(), trainable)
    for name in ("weight", "bias"):  # the order that the class has them in
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


def masked_names(module: nn.Module) -> list[str]:
    """The attributes that pruning and parametrizations compute."""
    hooks = module._forward_pre_hooks.values()
    names = [h._tensor_name for h in hooks if isinstance(h, prune.BasePruningMethod)]
    if parametrize.is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return list(dict.fromkeys(names))


@dataclass(eq=False)
class Edits:
    """New values of parameters and buffers, and new numbers of channels, of a model's modules."""

    values: dict[Place, Tensor] = field(default_factory=dict)
    attributes: dict[tuple[str, str], int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Make them in ``model``, whose tensors stay as they are."""
        for path in dict.fromkeys(place.path for place in self.values):
            module = model.get_submodule(path)
            if masked_names(module):
                unmask(module)
        for place, value in self.values.items():
            _put(model.get_submodule(place.path), place.name, value)
        for (path, name), number in self.attributes.items():
            module = model.get_submodule(path)
            if hasattr(module, name):
                setattr(module, name, number)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value.to(module._buffers[name].device)  # type: ignore[union-attr]
        return
    like = module._parameters.get(name)
    if like is None:
        like = module._parameters["weight"]
        assert like is not None
    value = value.to(like.device)
    if like.dim() == value.dim() == 4 and not like.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    module._parameters[name] = nn.Parameter(value, like.requires_grad)
