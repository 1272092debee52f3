"""Putting other layers in place of single calls of a model, on a copy of it.

The passes say which calls of the evidence change and into what; carrying that back to modules, or into the
traced code of modules, is that of merges (:mod:`convmerge.edit.lower`, :mod:`convmerge.edit.retrace`,
:mod:`convmerge.edit.rewrite`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx.node import Node

from convmerge.edit.edits import Edit, GraphEdit, Run, UnitEdit
from convmerge.edit.frames import Frames
from convmerge.edit.lower import lower
from convmerge.edit.retrace import Trace, retrace
from convmerge.edit.rewrite import Replacement, apply
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, copy_model
from convmerge.evidence.constants import Constants
from convmerge.evidence.copying import deep_copy
from convmerge.recognise import Passage
from convmerge.regions.elements import Leaf


@dataclass(frozen=True, eq=False)
class Change:
    """Calls that follow each other, the first one reading ``source``, and the layer that replaces them.

    ``layer`` takes the one tensor ``source``; None where that goes on as it is.
    """

    source: Node
    calls: tuple[Node, ...]
    layer: nn.Module | None


class Editor:
    """Makes changed copies of one model.

    Args:
        model: in eval mode; only read.
        evidence: what it computes.
    """

    def __init__(self, model: nn.Module, evidence: Evidence) -> None:
        self._model = model
        self._evidence = evidence
        self.constants = Constants(evidence)
        self.frames = Frames(evidence, self.constants)
        self._traces: dict[tuple[str, frozenset[str]], Trace] = {}
        self._scratch: nn.Module | None = None

    def apply(self, changes: Sequence[Change]) -> nn.Module:
        """A copy with all changes made, which shares its parameters and buffers with the model.

        Raises Refusal where a change cannot be written back to the modules.
        """
        replacements: dict[Edit, Replacement] = {}
        times: dict[Edit, int] = {}
        for change in changes:
            edit = lower(self.frames, _run(change), (), self._model)
            other = replacements.setdefault(edit, Replacement(edit, change.layer))
            if repr(other.layer) != repr(change.layer):
                raise Refusal(f"{_owner(edit)} is called twice and would become two different layers")
            times[edit] = times.get(edit, 0) + 1
        for edit, made in times.items():
            if isinstance(edit, UnitEdit) and len(self.frames.by_path[edit.survivor]) != made:
                raise Refusal(f"{edit.survivor} is called elsewhere too")
        copied = shallow_copy(self._model)
        return apply(copied, list(replacements.values()), self._trace_owners(list(replacements)))

    def _trace_owners(self, edits: Sequence[Edit]) -> dict[str, Trace]:
        opened: dict[str, set[str]] = {}
        for edit in edits:
            if isinstance(edit, GraphEdit):
                opened.setdefault(edit.owner, set()).update(edit.opened)
        inner = {path for paths in opened.values() for path in paths}
        if both := inner & opened.keys():
            raise Refusal(f"{both.pop()} stands in a module whose own code changes")
        return {owner: self._trace(owner, paths) for owner, paths in opened.items()}

    def _trace(self, owner: str, paths: set[str]) -> Trace:
        start = len(owner) + 1 if owner else 0
        opened = frozenset(path[start:] for path in paths)
        if (owner, opened) not in self._traces:
            self._scratch = self._scratch or copy_model(self._model)  # tracing can leave marks
            frames = self.frames.by_path[owner]
            if len(frames) > 1:
                raise Refusal(f"{owner} is called {len(frames)} times")
            module, calls = self._scratch.get_submodule(owner), self.frames.calls[frames[0]]
            trace = retrace(module, frames[0], self._evidence, self.constants, calls, opened)
            self._traces[owner, opened] = trace
        return self._traces[owner, opened]


def shallow_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules can be changed without changing the model's; its tensors are the model's own."""
    own = itertools.chain(model.parameters(), model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in own}
    for module in model.modules():
        computed = (value for value in vars(module).values() if isinstance(value, Tensor))
        memo.update({id(tensor): tensor.detach() for tensor in computed})
    return deep_copy(model, memo)


def _run(change: Change) -> Run:
    """The calls as elements of a chain."""
    values = (change.source, *change.calls)
    return Run(
        tuple(
            Leaf(before, node, Passage(before, {}, node.name)) for before, node in itertools.pairwise(values)
        )
    )


def _owner(edit: Edit) -> str:
    return edit.survivor if isinstance(edit, UnitEdit) else edit.owner or "the model"
