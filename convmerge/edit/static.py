"""Is a site proved by the code around it, or only seen on the example inputs' path?"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

from torch import fx, nn

from convmerge.edit.edits import Edits, GraphEdit, UnitEdit
from convmerge.evidence.capture import Signature, plain_defaults
from convmerge.evidence.tracing import quiet, unmarked


class _SequentialsOpen(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential


class StaticProofs:
    """Traces enclosing modules (of a scratch copy of the model), each at most once."""

    def __init__(self, scratch: nn.Module, signatures: dict[str, Signature]) -> None:
        self._scratch = scratch
        self._signatures = signatures
        self._traces: dict[str, fx.Graph | None] = {}

    def proves(self, edits: Edits) -> bool:
        """Whether a trace of the smallest enclosing module makes the same calls on every path.

        A graph edit is one of such a trace. Modules in a row are proved if the trace calls each of them
        once and each but the last is read by the next one alone.
        """
        if len(edits) == 1 and isinstance(edits[0], GraphEdit):
            return True
        paths = [p for e in edits for p in (e.modules if isinstance(e, UnitEdit) else (e.owner,))]
        owner = _common(paths)
        if len(paths) == 1:
            module = self._scratch.get_submodule(owner)
            return type(module).__module__.startswith("torch.nn.") or self._trace(owner) is not None
        if (graph := self._trace(owner)) is None:
            return False
        start = len(owner) + 1 if owner else 0
        names = {path[start:] for path in paths}
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target in names]
        if sorted(str(n.target) for n in calls) != sorted(names):
            return False
        return all(_leads_to(first, second) for first, second in itertools.pairwise(calls))

    def _trace(self, path: str) -> fx.Graph | None:
        if path not in self._traces:
            module = self._scratch.get_submodule(path)
            signature = self._signatures.get(path, Signature(True, 1))
            try:
                bound = inspect.signature(module.forward).bind(*signature.args, **signature.kwargs)
                absent = {k: v for k, v in plain_defaults(module).items() if k not in bound.arguments}
                with quiet(), unmarked(module):
                    self._traces[path] = _SequentialsOpen().trace(module, concrete_args=absent or None)
            except Exception:  # torch.fx raises many types on code it cannot follow: then nothing is proved
                self._traces[path] = None
        return self._traces[path]


def _common(paths: Sequence[str]) -> str:
    """The longest module path that encloses all ``paths``; for a single path, itself."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        length = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[: min(len(common), len(parts)) if length is None else length]
    return ".".join(common)


def _leads_to(first: fx.Node, second: fx.Node) -> bool:
    """Whether everything that reads ``first`` leads to ``second`` through single readers."""
    node = first
    while len(node.users) == 1:
        (node,) = node.users
        if node is second:
            return True
    return False
