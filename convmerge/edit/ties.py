"""Weights that are read outside a site too, and must keep existing there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn
from torch.fx.node import Node

from convmerge.edit.edits import Edits, GraphEdit, UnitEdit
from convmerge.evidence.capture import Evidence
from convmerge.evidence.constants import Constants


class Ties:
    """Who reads which weights of one model."""

    def __init__(self, model: nn.Module, evidence: Evidence, constants: Constants) -> None:
        self._evidence = evidence
        self._constants = constants
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors.update(model.named_buffers(remove_duplicate=False))

    def tied(self, read_by: Sequence[Node], edits: Edits, calls: set[Node]) -> str | None:
        """Why a weight that ``read_by`` read must keep existing although ``calls`` go, or None."""
        direct, computed = self._weights(read_by)
        readers = {weight: set(weight.users) | self._twins(weight) for weight in direct}
        readers |= {w: set(w.users) for w in computed if w not in direct and self._goes(w, edits)}
        for weight, users in readers.items():
            if self._needed(users, calls, edits):
                return f"{self._evidence.tensors[weight][0]} is used elsewhere too"
        return None

    def _weights(self, calls: Sequence[Node]) -> tuple[set[Node], set[Node]]:
        """Parameters and buffers that calls read, and those that what they read is computed from."""
        read = {n for call in calls for n in call.all_input_nodes if n in self._constants}
        seen, pending = set(read), list(read)
        while pending:
            sources = [n for n in pending.pop().all_input_nodes if n not in seen]
            seen.update(sources)
            pending.extend(sources)
        tensors = self._evidence.tensors
        return {n for n in read if n in tensors}, {n for n in seen if n in tensors}

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            names.setdefault(id(tensor), []).append(name)
        return names

    def _goes(self, weight: Node, edits: Edits) -> bool:
        """Whether a weight is registered nowhere but in modules that edits change."""
        changed = [*_replaced(edits), *(edit.owner for edit in edits if isinstance(edit, GraphEdit))]
        names = self._names.get(id(self._tensors.get(self._evidence.tensors[weight][0])), [])
        inside = [
            any(f"{name}.".startswith(f"{path}." if path else "") for path in changed) for name in names
        ]
        return bool(inside) and all(inside)

    def _needed(self, readers: set[Node], calls: set[Node], edits: Edits) -> bool:
        """Whether what a weight's readers compute is read by anything but ``calls``.

        What nobody reads, or is written into another constant, goes with a module that is replaced whole.
        """
        replaced = _replaced(edits)
        seen, pending = set(calls), list(readers)
        while pending:
            reader = pending.pop()
            call = self._evidence.calls.get(reader)
            if call is None or reader in seen:
                continue
            seen.add(reader)
            if reader not in self._constants or reader in self._evidence.outputs:
                return True
            if not reader.users and not any(frame.path in replaced for frame in call.stack):
                return True
            pending.extend(reader.users)
        return False

    @cached_property
    def _by_storage(self) -> dict[int, list[Node]]:
        nodes: dict[int, list[Node]] = {}
        for node, (_, tensor) in self._evidence.tensors.items():
            if tensor.numel():
                nodes.setdefault(tensor.data_ptr(), []).append(node)
        return nodes

    def _twins(self, weight: Node) -> set[Node]:
        """Calls that read the same storage under another name."""
        tensor = self._evidence.tensors[weight][1]
        return {u for twin in self._by_storage.get(tensor.data_ptr(), []) for u in twin.users}


def _replaced(edits: Edits) -> list[str]:
    """Modules that are replaced whole."""
    return [path for edit in edits if isinstance(edit, UnitEdit) for path in edit.modules]
