"""The numbers of a computed kernel merged with constant pointwise operators around it, in float64.

Kernel and bias of the layer are linear in what the generator's last layer reads, h: every number of them is a
row of (weight, bias) applied to (h, 1). So are those of the merged layer, with combined rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry


@dataclass(frozen=True, eq=False)
class Rows:
    """Kernel and bias of a layer as linear functions of (h, 1); float64.

    Attributes:
        kernel: shape (out, in / groups, *kernel, 1 + h).
        bias: shape (out, 1 + h), or None.
        groups: of the layer.
    """

    kernel: Tensor
    bias: Tensor | None
    groups: int

    @property
    def constant_bias(self) -> bool:
        """Whether the bias does not depend on h."""
        return self.bias is not None and not bool(self.bias[:, :-1].any())

    def after(self, form: Affine) -> Rows:
        """With a pointwise form before the layer: y = K(P x + p) + b."""
        k, groups = self.kernel, self.groups
        out, into = k.shape[0], k.shape[1]
        grouped = k.reshape(groups, out // groups, into, *k.shape[2:])
        bias = self.bias
        if form.bias is not None:
            moved = torch.einsum("goi...h,gi->go...h", grouped, form.bias.reshape(groups, into))
            moved = moved.reshape(out, -1, k.shape[-1]).sum(1)
            bias = moved if bias is None else bias + moved
        matrix = form.weight.flatten(1)
        if form.geometry.diagonal:
            scale = matrix.reshape(groups, 1, into, *(1,) * (k.dim() - 2))
            return Rows((grouped * scale).reshape(k.shape), bias, groups)
        return Rows(torch.einsum("oi...,ij->oj...", k, matrix), bias, groups)

    def before(self, form: Affine) -> Rows:
        """With a pointwise form after the layer: y = Q (K x + b) + q."""
        matrix, bias = form.weight.flatten(1), self.bias
        if form.geometry.diagonal:
            kernel = self.kernel * matrix.reshape(-1, *(1,) * (self.kernel.dim() - 1))
            bias = None if bias is None else bias * matrix
        else:
            kernel = torch.tensordot(matrix, self.kernel, 1)
            bias = None if bias is None else matrix @ bias
        if form.bias is not None:
            bias = kernel.new_zeros(kernel.shape[0], kernel.shape[-1]) if bias is None else bias.clone()
            bias[:, -1] += form.bias
        return Rows(kernel, bias, self.groups)

    def magnitude(self) -> Rows:
        """The same with absolute values."""
        return Rows(self.kernel.abs(), None if self.bias is None else self.bias.abs(), self.groups)

    def at(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias for one h."""
        one = torch.cat([h.flatten(), h.new_ones(1)])
        return self.kernel @ one, None if self.bias is None else self.bias @ one


def merged_geometry(layer: Geometry, before: Geometry | None, after: Geometry | None) -> Geometry:
    """The layer's geometry with pointwise forms before and after it."""
    return Geometry(
        layer.in_channels if before is None else before.in_channels,
        layer.out_channels if after is None else after.out_channels,
        layer.groups,
        layer.kernel,
        layer.up,
        layer.down,
        layer.dilation,
        layer.lo,
        layer.hi,
        layer.bias or any(form is not None and form.bias for form in (before, after)),
    )
