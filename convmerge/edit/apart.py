"""Carrying a site back to the modules that its parts stand in, each edited by itself.

A run can begin at the end of one module and end at the beginning of the next one. The code that calls both
need not be known then: the evidence shows that what one part hands to the next is read by that part alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn
from torch.fx.node import Node

from convmerge.edit.edits import Edit, Edits, Run, UnitEdit
from convmerge.edit.frames import Frames, innermost_common
from convmerge.edit.lower import check_memory, edge_of, fork_of, gap_of, lower, open_block, resized_of
from convmerge.errors import Refusal
from convmerge.evidence.capture import Frame
from convmerge.recognise import Same
from convmerge.regions.elements import Element, Leaf, calls_of


def lower_apart(
    frames: Frames, home: Run, emptied: Sequence[Run], model: nn.Module, added: Node | None = None
) -> Edits:
    """How the parts of a site are written back one by one; see :func:`convmerge.edit.lower.lower`.

    Raises Refusal where it has one part only, or no way is known to be exact for one of them.
    """
    check_memory(frames.evidence, home, emptied)
    whole = added is not None or edge_of(home) or gap_of(home) or open_block(home) or fork_of(home)
    sized = resized_of(home) is not None  # the layer is given the size where the upsampling was
    places = [home] if whole or sized else _parts(frames, home)
    gone = [part for run in emptied for part in _parts(frames, run)]
    if len(places) + len(gone) < 2:
        raise Refusal("it stands in the code of one module")
    edits = [lower(frames, run, (), model, added if run is home else None) for run in places]
    chosen = max(range(len(edits)), key=lambda i: (_rank(edits[i], model), -i))
    first = edits.pop(chosen)
    return (first, *edits, *(lower(frames, run, (), model) for run in gone))


def _parts(frames: Frames, run: Run) -> list[Run]:
    """The run as parts that each stand in the code of one module; identities stay where they are."""

    def place(element: Element) -> Frame:
        return innermost_common(frames, calls_of([element]))

    solid = [
        e for e in run.elements if calls_of([e]) and not (isinstance(e, Leaf) and isinstance(e.step, Same))
    ]
    return [Run(tuple(group)) for _, group in itertools.groupby(solid, place)]


def _rank(edit: Edit, model: nn.Module) -> tuple[bool, int]:
    """Where the merged layer had best stand: in the place of a module, of the one with the most weights."""
    if not isinstance(edit, UnitEdit):
        return False, 0
    return True, sum(p.numel() for p in model.get_submodule(edit.survivor).parameters())
