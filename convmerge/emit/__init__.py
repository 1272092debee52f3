"""From a form to plain torch.nn layers: every way to build it, decided on geometry, and the building."""

from convmerge.emit.build import build, empty_layer, round_once
from convmerge.emit.layer import Emission, Kind, Layer
from convmerge.emit.ways import emissions, flattened, swapped

__all__ = [
    "Emission",
    "Kind",
    "Layer",
    "build",
    "emissions",
    "empty_layer",
    "flattened",
    "round_once",
    "swapped",
]
