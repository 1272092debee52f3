"""Which inputs of a form reach which of its outputs, and the form on some of its channels alone.

The non-zero pattern of a weight is a bipartite graph of input and output channels. Its connected components
are the blocks of a block-diagonal weight, found whatever permutation of the channels hides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.bias import concatenate_biases

Channels = tuple[int, ...]
SWEEPS = 3


def components(count: int, edges: Tensor) -> Tensor:
    """Connected components of an undirected graph: int64, shape (count,), the smallest node of each node's.

    edges: int64, shape (2, number of edges). Every round hooks trees onto smaller ones and flattens them (Y.
    Shiloach and U. Vishkin, J. Algorithms 3(1), 1982), so that long paths take few rounds.
    """
    label = torch.arange(count)
    while True:
        ends = label[edges]
        least = ends.min(0).values
        hooked = label.scatter_reduce(0, ends.flatten(), least.repeat(2), "amin")
        while not torch.equal(hooked, flat := hooked[hooked]):
            hooked = flat
        if torch.equal(hooked, label):
            return label
        label = hooked


def edges_of_geometry(g: Geometry) -> Tensor:
    """Edges that connect every group's channels, int64, shape (2, ·): input channels above output channels.

    Not all pairs, but enough of them for the same components.
    """
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    inputs, outputs = torch.arange(g.in_channels), torch.arange(g.out_channels)
    first_input, first_output = outputs // out * into, inputs // into * out
    return torch.stack([torch.cat([inputs, first_input]), torch.cat([first_output, outputs])])


def edges_of_weight(form: Affine) -> Tensor:
    """Edges between the channels of non-zero weights, int64, shape (2, ·), and of outputs that have none.

    An output of zeros goes with the block of the output beside it, and so does an input that nothing reads,
    so that a block with a zero row or column keeps its size. Where every output is one of the inputs, as in
    a slice, inputs that are left out are of no block.
    """
    g = form.geometry
    used = form.weight.reshape(*form.weight.shape[:2], -1).any(2)  # (out, in / groups)
    if not used.any() or (g.groups == 1 and _hangs_together(used)):
        return edges_of_geometry(g)
    outputs, inputs = used.nonzero(as_tuple=True)
    inputs = inputs + outputs // (g.out_channels // g.groups) * (g.in_channels // g.groups)
    edges = torch.stack([inputs, outputs])
    silent = _like_their_neighbours(edges[1], edges[0], g.out_channels).flip(0)
    selects = len(outputs) == g.out_channels and not silent.numel()
    unread = edges[:, :0] if selects else _like_their_neighbours(edges[0], edges[1], g.in_channels)
    return torch.cat([edges, silent, unread], 1)


def _hangs_together(used: Tensor) -> bool:
    """Whether a walk of a few steps from the first row meets every row and column, as in most weights."""
    rows = torch.zeros(len(used), dtype=torch.bool)
    rows[0] = True
    for _ in range(SWEEPS):
        columns = used[rows].any(0)
        rows |= used[:, columns].any(1)
        if rows.all() and used[rows].any(0).all():
            return True
    return False


def _like_their_neighbours(here: Tensor, there: Tensor, count: int) -> Tensor:
    """For every channel of 0..count-1 that is not in ``here`` an edge to where the one before it has one.

    Returns int64, shape (2, ·); where none comes before, the first one after counts.
    """
    other = torch.full((count,), -1, dtype=torch.int64)
    other[here] = there
    known = (other >= 0).nonzero().flatten()
    missing = (other < 0).nonzero().flatten()
    before = (torch.searchsorted(known, missing) - 1).clamp_min(0)
    return torch.stack([missing, other[known[before]]])


def restrict_geometry(g: Geometry, inputs: Sequence[int], outputs: Sequence[int]) -> Geometry:
    """The geometry of :func:`restrict`."""
    groups = len(inputs) if g.diagonal and tuple(inputs) == tuple(outputs) else 1
    return replace(g, in_channels=len(inputs), out_channels=len(outputs), groups=groups)


def restrict(form: Affine, inputs: Sequence[int], outputs: Sequence[int]) -> Affine:
    """The outputs ``outputs`` as a form of the inputs ``inputs`` alone; dense, or diagonal as before.

    Equal to the form at these outputs if they depend on no other input.
    """
    g = restrict_geometry(form.geometry, inputs, outputs)
    kept, rows = torch.tensor(inputs), torch.tensor(outputs)
    weight = form.weight[rows]
    if g.groups == 1:
        weight = _columns(weight, rows, kept, form.geometry)
    bias = None if form.bias is None else form.bias[rows]
    return Affine(g, weight, bias, None if form.ones is None else form.ones[rows])


def _columns(weight: Tensor, rows: Tensor, kept: Tensor, g: Geometry) -> Tensor:
    """weight (rows, in / groups, *k) on the inputs ``kept``, zeros where these are of another group."""
    if g.groups == 1:
        return weight[:, kept]
    into = g.in_channels // g.groups
    group = rows // (g.out_channels // g.groups)
    column = kept.unsqueeze(0) - (group * into).unsqueeze(1)
    inside = (column >= 0) & (column < into)
    row = torch.arange(len(rows)).unsqueeze(1).expand_as(column)
    found = weight[row, column.clamp(0, into - 1)]
    return found * inside.reshape(*inside.shape, *(1,) * (weight.dim() - 2))


def repeat_geometry(g: Geometry, times: int) -> Geometry:
    """The geometry of :func:`diagonal_sum` of ``times`` forms of geometry ``g``."""
    return replace(
        g, in_channels=times * g.in_channels, out_channels=times * g.out_channels, groups=times * g.groups
    )


def diagonal_sum(forms: Sequence[Affine]) -> Affine:
    """cat([f(x_f) for f in forms]) of forms of equal geometry, each on its own channels: one grouped form.

    Raises:
        ValueError: the geometries differ by more than the bias.
    """
    bias = any(f.bias is not None for f in forms)
    first = replace(forms[0].geometry, bias=bias)
    if any(replace(f.geometry, bias=bias, phased=first.phased) != first for f in forms):
        raise ValueError("only forms of one geometry make a grouped one")
    geometry = repeat_geometry(first, len(forms))
    biases = [_bias_of(f) for f in forms]
    ones = torch.cat([f.ones for f in forms if f.ones is not None]) if first.ones else None
    return Affine(
        geometry, torch.cat([f.weight for f in forms]), concatenate_biases(biases) if bias else None, ones
    )


def _bias_of(form: Affine) -> Tensor:
    return form.weight.new_zeros(form.geometry.out_channels) if form.bias is None else form.bias
