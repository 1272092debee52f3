"""Random values for example inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that torch's global one is left alone; any integer is a seed."""
    return torch.Generator().manual_seed(seed % 2**63)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Code in here that draws random numbers, such as a model's own, changes nothing for what comes after."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        yield


def random_tensor(shape: Sequence[int], dtype: torch.dtype, high: int, generator: torch.Generator) -> Tensor:
    """Standard normal values, integers from 0 to ``high`` - 1, or fair booleans, on the CPU."""
    if dtype.is_floating_point or dtype.is_complex:
        # Drawn in double and rounded, so that a seed gives the same numbers in every dtype.
        draw = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(tuple(shape), dtype=draw, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    high = min(high, torch.iinfo(dtype).max)
    return torch.randint(0, high, tuple(shape), generator=generator).to(dtype)


def integer_range(model: nn.Module) -> int:
    """One more than the largest integer every embedding of the model takes; 2 where it has none."""
    embeddings = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return max(min((m.num_embeddings for m in embeddings), default=2), 1)
