"""Are two models the same function (compare), and is one merge exact (probe)."""

from convmerge.verification.compare import compare
from convmerge.verification.probes import Probe, bisect, probe, rounded_once

__all__ = ["Probe", "bisect", "compare", "probe", "rounded_once"]
