"""Two models side by side: time of a forward pass in turn, peak memory, MACs and parameters."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convmerge.counts import count
from convmerge.errors import ConvmergeError
from convmerge.inputs import Inputs
from convmerge.report import Counts, Speedup

SHORTEST = 0.05  # seconds: faster passes are repeated until they take this long


@dataclass(frozen=True)
class Benchmark:
    """Two models in figures: ``counts`` and ``peak_bytes`` of each, and how they compare in time."""

    speedup: Speedup
    counts: tuple[Counts, Counts]
    peak_bytes: tuple[int, int]


def benchmark(
    a: nn.Module, b: nn.Module, inputs: Inputs, *, pairs: int = 15, threads: int | None = None
) -> Benchmark:
    """Measure two models, both in eval mode; a forward may change their buffers and attributes.

    Raises ConvmergeError where one of them does not run on the inputs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        peaks = peak_bytes(a, inputs), peak_bytes(b, inputs)
        return Benchmark(speedup(a, b, inputs, pairs=pairs), (count(a, inputs), count(b, inputs)), peaks)
    except ConvmergeError:
        raise
    except Exception as error:  # the model's own code can raise anything
        raise ConvmergeError(
            f"a model does not run on these inputs: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="give the inputs that both take with --input",
        ) from error
    finally:
        torch.set_num_threads(before)


def speedup(
    a: nn.Module,
    b: nn.Module,
    inputs: Inputs,
    *,
    pairs: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> Speedup:
    """How many times faster ``b`` is than ``a``, from runs in turn.

    Whatever else the machine does meets both models of a pair. The order within a pair alternates, the ratio
    is taken within it, and the median and quartiles are over the pairs. Both models must be in eval mode.
    """
    runs = (_pass(a, inputs), _pass(b, inputs))
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        for run in runs * 2:
            run()  # what a first pass sets up is not what it takes
        for pair in range(pairs):
            order = (0, 1) if pair % 2 else (1, 0)
            found = {which: _seconds(runs[which], clock) for which in order}
            times.append((found[0], found[1]))
    low, median, high = statistics.quantiles([x / y for x, y in times], n=4)
    seconds = tuple(statistics.median(side) for side in zip(*times, strict=True))
    return Speedup(median, (low, high), (seconds[0], seconds[1]), torch.get_num_threads())


def peak_bytes(model: nn.Module, inputs: Inputs) -> int:
    """The most that the tensors which a forward pass makes take up at one time, in bytes.

    Parameters, buffers and inputs do not count, nor does what a kernel uses within a call. The model, in eval
    mode, may change its own buffers and attributes.
    """
    alive = _Alive()
    with torch.no_grad(), alive:
        model(*inputs.args, **inputs.kwargs)
    return alive.most


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of the tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known and id(storage) not in given:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.most = max(self.most, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _pass(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return lambda: model(*inputs.args, **inputs.kwargs)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Of as many passes as make up the shortest time, per pass."""
    passes, total = 0, 0.0
    while total < SHORTEST:
        start = clock()
        run()
        total += clock() - start
        passes += 1
    return total / passes
