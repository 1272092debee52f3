"""What a fully convolutional model must equal: the model's own code, run on one window after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmerge.affine import Dims
from convmerge.inputs import Inputs
from convmerge.verification.variants import redrawn


class Windows(nn.Module):
    """(N, C, *S) → (N · positions, C, *size): every window of ``size``, ``step`` apart, as a sample.

    Attributes:
        grid: how many windows the last input had along each axis.
    """

    def __init__(self, size: Dims, step: Dims) -> None:
        super().__init__()
        self.size, self.step, self.grid = size, step, (1,) * len(size)

    def forward(self, x: Tensor) -> Tensor:
        for axis, (size, step) in enumerate(zip(self.size, self.step, strict=True), start=2):
            x = x.unfold(axis, size, step)  # the window's own axes come last
        n = len(self.size)
        self.grid = tuple(x.shape[2 : 2 + n])
        return x.movedim(1, 1 + n).reshape(-1, x.shape[1], *self.size)


class OnWindows(nn.Module):
    """A model that treats windows as samples, with what it gives for them laid out as maps again.

    Args:
        model: gives N · positions samples, the windows being cut inside it or, with ``cut``, from its input.
        outputs: index of a returned tensor → size of the windows that it is of; the others are left alone.
        average: give the mean over the windows and not the map.
    """

    def __init__(
        self, model: nn.Module, outputs: Mapping[int, Dims], average: bool, cut: Windows | None = None
    ) -> None:
        super().__init__()
        self.model, self.outputs, self.average, self.cut = model, dict(outputs), average, cut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.cut is not None:
            cut: Any = self.cut
            args, kwargs = pytree.tree_map_only(Tensor, cut, (args, kwargs))
        leaves, spec = pytree.tree_flatten(self.model(*args, **kwargs))
        for index, window in self.outputs.items():
            leaves[index] = self._folded(leaves[index], self.grid(window))
        return pytree.tree_unflatten(leaves, spec)

    def grid(self, window: Dims) -> Dims:
        """How many windows there were in the last run; one where nothing was cut."""
        cuts = [self.cut] if self.cut else (m for m in self.modules() if isinstance(m, Windows))
        grids = (cut.grid for cut in cuts if self.cut or cut.size == window)
        return next(grids, (1,) * len(window))

    def _folded(self, y: Tensor, grid: Dims) -> Tensor:
        y = y.reshape(-1, math.prod(grid), *y.shape[1:])
        if self.average:
            return y.mean(1)
        features = y.shape[2:3]  # none where one number was picked
        return y.reshape(*y.shape[:2], *features).movedim(1, -1).reshape(-1, *features, *grid)


def enlarged(inputs: Inputs, steps: Dims | None) -> Iterator[Inputs]:
    """Inputs on which the maps before a head are larger, to be tried in turn.

    Where the positions of the map are ``steps`` apart in the input, such as have one more along the first
    axis, two more along the second, and so on; then such as are larger by a quarter, and twice as large.
    """
    generator = torch.Generator().manual_seed(0)
    rank = max((x.dim() for x in inputs.tensors() if x.is_floating_point()), default=0)

    def resized(size: Callable[[int, int], int]) -> Inputs:
        def draw(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.dim() != rank:
                return x
            sizes = (size(n, axis) for axis, n in enumerate(x.shape[2:]))
            return redrawn(x, (*x.shape[:2], *sizes), generator)

        return inputs.map(draw)

    if steps is not None:
        yield resized(lambda n, axis: n + steps[axis] * (axis + 1))
    yield resized(lambda n, axis: (n * 5 // 4 + 31) // 32 * 32)
    yield resized(lambda n, axis: 2 * n)
