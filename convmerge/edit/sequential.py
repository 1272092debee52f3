"""A traced module that turned out to be modules in a row is written as ``nn.Sequential``.

Unlike a GraphModule it holds no code, so the file it is saved in can be loaded without trusting it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

# Functions of one tensor → the module that calls them, given the other arguments.
MODULES: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    F.softplus: nn.Softplus,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.pixel_shuffle: nn.PixelShuffle,
}
METHODS: dict[str, Callable[..., nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def as_sequential(owner: nn.Module, graph: fx.Graph) -> nn.Sequential | None:
    """The graph as modules in a row under their own names, or None where it is anything else."""
    nodes = list(graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    if len(placeholders) != 1 or placeholders[0].args or str(placeholders[0].target).startswith("*"):
        return None
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    value = placeholders[0]
    for node in nodes[1:-1]:
        if (
            not node.args
            or node.args[0] is not value
            or node.all_input_nodes != [value]
            or len(value.users) != 1
        ):
            return None
        part = _module(owner, node)
        name = str(node.target) if node.op == "call_module" else node.name
        if part is None or name in parts or ("." in name and list(part.parameters())):
            return None
        if type(part) is not nn.Identity:
            parts[name.replace(".", "_")] = part
        value = node
    return nn.Sequential(parts) if nodes[-1].args == (value,) and parts else None


def _module(owner: nn.Module, node: Node) -> nn.Module | None:
    if node.op == "call_module":
        return owner.get_submodule(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
    make = MODULES.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))
    if make is None or (node.op == "call_method" and len(node.args) > 1):
        return None
    try:
        return make(*node.args[1:], **node.kwargs)
    except TypeError:
        return None
