"""Flatten and linear layers as convolutions: the model takes larger inputs and gives a map of outputs.

A linear layer (out, C · h · w) on a flattened map is a convolution with kernel (out, C, h, w), and every
later one a 1×1 convolution (Long, Shelhamer and Darrell, Fully Convolutional Networks, 2015). Adaptive
pooling, whose cells grow with the input, is pinned to the cells that it has at the example inputs' size. At
that size the outputs are the original's; on a larger input they are those of the original head on every
window of the map that the head starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx.node import Node
from torch.utils import _pytree as pytree

from convmerge.errors import ConvmergeError, Refusal
from convmerge.evidence.capture import Evidence, capture
from convmerge.inputs import Inputs
from convmerge.passes import Prepared
from convmerge.passes.edits import Change, Editor
from convmerge.passes.heads import Head, find_heads
from convmerge.passes.pools import ADAPTIVE_AVERAGE
from convmerge.passes.strides import Strides, strides_to
from convmerge.passes.windows import OnWindows, Windows, enlarged
from convmerge.recognise import Context
from convmerge.report import SiteReport
from convmerge.verification.compare import about_equal, same_in_float64
from convmerge.verification.errormodel import call
from convmerge.verification.outputs import mismatch
from convmerge.verification.probes import first_line

HINT = "leave --fully-conv out to merge the model as it is"


def fully_convolutional(model: nn.Module, inputs: Inputs, average: bool = False) -> Prepared:
    """Rewrite the heads of ``model`` for maps, and check them on windows.

    Args:
        model: in eval mode.
        inputs: of the size that one window is to have.
        average: outputs stay (N, F), the mean over all windows; without it they become (N, F, *positions).

    Raises:
        ConvmergeError: no head can be rewritten, with the reason, or the result failed its check.
    """
    evidence = capture(model, inputs)
    editor = Editor(model, evidence)
    context = Context(evidence, editor.constants)
    heads, refused = find_heads(context, model)
    if not heads:
        none = "no output is a vector that a map was flattened or pooled into"
        raise _impossible(next(iter(refused.values()), none))
    try:
        return _Conversion(model, inputs, context, editor, heads, average).prepared(refused)
    except Refusal as refusal:
        raise _impossible(refusal.reason) from refusal


def _impossible(reason: str) -> ConvmergeError:
    return ConvmergeError(f"the head cannot become fully convolutional: {reason}", HINT)


class _Conversion:
    """One model with heads that can be rewritten."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        context: Context,
        editor: Editor,
        heads: Sequence[Head],
        average: bool,
    ) -> None:
        self.model, self.inputs, self.evidence = model, inputs, context.evidence
        self.editor, self.heads, self.average = editor, heads, average
        windows = {head.output: head.window for head in heads}
        returned = _returned(self.evidence)
        self.outputs = {i: windows[node] for i, node in enumerate(returned) if node in windows}
        self.strides = {head.output: _common([strides_to(context, m) for m in head.maps]) for head in heads}

    def prepared(self, refused: dict[Node, str]) -> Prepared:
        """The rewritten model with what it must equal. Raises Refusal where a check fails."""
        converted = self.editor.apply(self._changes())
        reference = OnWindows(self.editor.apply(self._entries()), self.outputs, self.average)
        self._check_reference(reference)
        larger = self._larger(reference)
        if (reason := same_in_float64(reference, converted, larger)) is not None:
            raise Refusal(f"it is not the original's on windows: {reason}")
        sites = [self._site(head, self._of_the_input(head, converted, larger)) for head in self.heads]
        sites += [_refused(self.evidence, output, reason) for output, reason in refused.items()]
        return Prepared(converted, self.inputs, tuple(sites), reference, required=True)

    def _changes(self) -> list[Change]:
        changes: dict[Node, Change] = {}
        for head in self.heads:
            changes |= head.changes
        if self.average:
            for head in self.heads:
                changes[head.output] = _averaged(self.evidence, head, changes.get(head.output))
        return list(changes.values())

    def _entries(self) -> list[Change]:
        """What makes the original head work on the windows of its maps as samples."""
        entries: dict[Node, Change] = {}
        for head in self.heads:
            one = (1,) * len(head.window)
            for node, entry in head.entries.items():
                assert entry.layer is not None
                cut = nn.Sequential(Windows(head.window, one), entry.layer)
                entries[node] = replace(entry, layer=cut)
        return list(entries.values())

    def _larger(self, reference: OnWindows) -> Inputs:
        """Inputs that give several windows. Raises Refusal where the model takes none."""
        steps = _common(list(self.strides.values())).steps
        reason = "the map before it has the same size on larger inputs"
        for inputs in enlarged(self.inputs, steps):
            try:
                call(reference, inputs)
            except Exception as error:  # the layers before the head may say anything to other sizes
                reason = f"the layers before it fail on larger inputs: {first_line(error)}"
                continue
            if all(max(reference.grid(window)) > 1 for window in self.outputs.values()):
                return inputs
        raise Refusal(reason)

    def _check_reference(self, reference: OnWindows) -> None:
        """The model's own layers on its one window must be the model."""
        own, same = (
            call(model, self.inputs)
            for model in (OnWindows(self.model, self.outputs, self.average), reference)
        )
        tensors = [(x, same.get(name)) for name, x in own.items() if isinstance(x, Tensor)]
        if mismatch(own, same) or not all(isinstance(y, Tensor) and about_equal(x, y) for x, y in tensors):
            raise Refusal("the layers of its head do not take each window as a sample of its own")

    def _of_the_input(self, head: Head, converted: nn.Module, larger: Inputs) -> str:
        """What windows of the input have to do with the outputs, in words."""
        strides, image = self.strides[head.output], self.inputs.tensors()[0]
        differ = "those of the input differ at their borders"
        if strides.borders is not None or strides.steps is None:
            return f"; {differ}{f': {strides.borders}' if strides.borders else ''}"
        size = tuple(image.shape[2:])
        cut = OnWindows(self.model, self.outputs, self.average, Windows(size, strides.steps))
        if same_in_float64(cut, converted, larger) is not None:
            return f"; {differ}"
        return f" and of {_times(size)} of the input, {_times(strides.steps)} apart"

    def _site(self, head: Head, of_the_input: str) -> SiteReport:
        evidence = self.evidence
        first, last = (evidence.calls[head.calls[i]].path for i in (0, -1))
        layers = [c.layer for c in head.changes.values() if c.layer is not None]
        weights = sum(p.numel() for layer in layers for p in layer.parameters())
        macs = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
        maps = " and ".join(_times(evidence.size(m)[1:]) for m in head.maps)
        return SiteReport(
            place=first if first == last else f"{first or 'the model'} … {last or 'the model'}",
            operators=tuple(evidence.calls[node].op for node in head.calls),
            geometry=f"{maps} → {_times(evidence.size(head.output)[1:])}",
            action="merge",
            reason=f"convolutions, exact for every window of {_times(head.window)} of this map{of_the_input}",
            macs_before=macs,
            macs_after=macs,
            weights_before=weights,
            weights_after=weights,
        )


def _returned(evidence: Evidence) -> list[object]:
    """What the model returns, tensor by tensor."""
    (output,) = evidence.graph.find_nodes(op="output")
    return pytree.tree_leaves(output.args[0])


# Calls that may end a head unchanged, as layers that something can follow.
LAST: dict[str, nn.Module] = {
    "softmax": nn.Softmax(1),
    "log_softmax": nn.LogSoftmax(1),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "relu": nn.ReLU(),
}


def _averaged(evidence: Evidence, head: Head, change: Change | None) -> Change:
    """The last call of a head, followed by the mean over the windows."""
    last, rank = evidence.calls[head.output], len(evidence.size(head.output))
    if rank < 2 or not evidence.dtype(head.output).is_floating_point or (not change and last.op not in LAST):
        where = f"{last.op} of {last.leaf}"
        raise Refusal(f"windows are not averaged after {where}; without --average it gives the map")
    layers = [change.layer] if change else [LAST[last.op]]
    layers += [ADAPTIVE_AVERAGE[len(head.window)](1), nn.Flatten(1) if rank == 2 else None]
    source = change.source if change else last.node.all_input_nodes[0]
    calls = change.calls if change else (last.node,)
    return Change(source, calls, nn.Sequential(*(layer for layer in layers if layer is not None)))


def _common(strides: Sequence[Strides]) -> Strides:
    """Of several maps together."""
    steps = {s.steps for s in strides}
    borders = next((s.borders for s in strides if s.borders), None)
    return Strides(steps.pop() if len(steps) == 1 else None, borders)


def _refused(evidence: Evidence, output: Node, reason: str) -> SiteReport:
    call = evidence.calls.get(output)
    operator = call.op if call else output.name
    return SiteReport(call.path if call else "", (operator,), "", "refuse", reason)


def _times(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
