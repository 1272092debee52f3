"""Rewrites of a whole model that come before its regions are merged.

A pass takes a model in eval mode and its example inputs, and gives a model that has less to compute, or that
takes other inputs. It never changes the model it is given. What it gives is compared as a whole with what it
must equal before anything else is done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from convmerge.evidence.capture import Evidence
from convmerge.inputs import Inputs
from convmerge.report import SiteReport


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a pass makes of a model.

    Attributes:
        model: the changed copy; the model that the pass was given, itself, where nothing changes.
        inputs: example inputs of ``model``.
        sites: what changed, and what did not and why, in the terms of the report.
        reference: computes on ``inputs`` what ``model`` must compute there, where the model that the pass was
            given does not (it takes other inputs, say). Only ever run, never written. None: the model before.
        required: without it the result is not what was asked for: where it fails its check, that is an error.
        evidence: what ``model`` computes, where the pass has captured that.
    """

    model: nn.Module
    inputs: Inputs
    sites: tuple[SiteReport, ...] = ()
    reference: nn.Module | None = None
    required: bool = False
    evidence: Evidence | None = None


Pass = Callable[[nn.Module, Inputs], Prepared]
