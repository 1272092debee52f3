"""What ``copy.deepcopy`` does not do for models."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` that keeps the plain attributes of traced modules.

    Copying a GraphModule keeps only what its own code refers to; code around it may read more off it.
    Pickling keeps everything.
    """
    copied = copy.deepcopy(model, memo)
    for path, old in model.named_modules():
        if isinstance(old, fx.GraphModule):
            new = copied.get_submodule(path)
            for name, value in vars(old).items():
                if not name.startswith("_") and name not in vars(new):
                    setattr(new, name, copy.deepcopy(value))
    return copied
