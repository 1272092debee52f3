"""The laws of the affine form, as pure functions: on :class:`~convmerge.affine.Geometry` for planning
(``*_geometry``), and on :class:`~convmerge.affine.Affine` in float64 for the numbers.
"""

from convmerge.algebra.branches import add, add_geometry, split, stack, stack_geometry
from convmerge.algebra.commute import commute, commutes_geometry
from convmerge.algebra.compose import compose, compose_geometry
from convmerge.algebra.multiples import with_fill, without_fill
from convmerge.algebra.pointwise import (
    diagonal,
    identity,
    lift,
    lift_geometry,
    scale,
    selection,
    unflatten,
    unflatten_geometry,
)

__all__ = [
    "add",
    "add_geometry",
    "commute",
    "commutes_geometry",
    "compose",
    "compose_geometry",
    "diagonal",
    "identity",
    "lift",
    "lift_geometry",
    "scale",
    "selection",
    "split",
    "stack",
    "stack_geometry",
    "unflatten",
    "unflatten_geometry",
    "with_fill",
    "without_fill",
]
