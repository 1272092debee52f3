"""Original and fused under eager mode, torch.compile with freezing, ONNX Runtime and OpenVINO, in one run.

    python tests/benchmarks/peers.py [NAME ...] [--size 96] [--pairs 9] [--threads 2] [--quick]

NAME is any part of a model's name; a runtime that is not installed is skipped. Every figure is the median
over the pairs: of original / fused within a runtime, and of original in eager mode / fused in it.
"""

from __future__ import annotations

import importlib
import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import catalogue
import tails
import torch
from table import chosen, parsed, parser
from torch import Tensor, nn

import convmerge

Run = Callable[[], object]
COLUMNS = "{:24} {:24} {:>16} {:>26}"


def main() -> None:
    found = parser(__doc__, pairs=9)
    found.add_argument("--size", type=int, default=96)
    arguments = parsed(found)
    print(COLUMNS.format("model", "runtime", "original / fused", "eager original / this fused"))
    for name in chosen(MODELS, arguments.names):
        try:
            model, x = MODELS[name](arguments.size)
        except ImportError as error:
            print(f"{name:24} skipped: {error}")
            continue
        pair = (model, convmerge.fuse(model, x).model)
        compare(name, pair, x, arguments.pairs, arguments.threads)


def tail(size: int) -> tuple[nn.Module, Tensor]:
    return tails.edsr_tail(64, 2, 2).eval(), torch.randn(1, 64, size, size)


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "EDSR tail ×2×2": tail,
    "edsr_baseline": lambda size: catalogue.build("torchsr/edsr_baseline", size),
}


def compare(name: str, pair: tuple[nn.Module, nn.Module], x: Tensor, pairs: int, threads: int) -> None:
    """Prepare both models in every runtime, run all of them in turn, print a row for each runtime."""
    runs: dict[str, tuple[Run, Run]] = {}
    for runtime, prepare in RUNTIMES.items():
        try:
            first, second = (prepare(model, x, threads) for model in pair)
        except ImportError as error:
            print(f"{name:24} {runtime:24} skipped: {error}", flush=True)
            continue
        runs[runtime] = (first, second)
    rounds = [{r: (seconds(a), seconds(b)) for r, (a, b) in runs.items()} for _ in range(pairs + 1)][1:]
    for runtime in runs:
        within = statistics.median(times[runtime][0] / times[runtime][1] for times in rounds)
        overall = statistics.median(times["eager"][0] / times[runtime][1] for times in rounds)
        print(COLUMNS.format(name, runtime, f"{within:.2f}×", f"{overall:.2f}×"), flush=True)


def seconds(run: Run) -> float:
    """Of as many calls as make up a twentieth of a second, per call."""
    calls, total = 0, 0.0
    while total < 0.05:
        start = time.perf_counter()
        run()
        total += time.perf_counter() - start
        calls += 1
    return total / calls


def eager(model: nn.Module, x: Tensor, threads: int) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    """torch.compile with the weights as constants."""
    config = importlib.import_module("torch._inductor.config")
    config.freezing = True
    torch._dynamo.reset()
    function = torch.compile(model)

    def run() -> Tensor:
        with torch.no_grad():
            return function(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(run(), model, x)
    return run


def onnx_of(model: nn.Module, x: Tensor) -> bytes:
    importlib.import_module("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    return file.getvalue()


def onnx_runtime(model: nn.Module, x: Tensor, threads: int) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(onnx_of(model, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}

    def run() -> Sequence[object]:
        return session.run(None, feed)

    same(torch.from_numpy(run()[0]), model, x)
    return run


def openvino(model: nn.Module, x: Tensor, threads: int) -> Run:
    core = importlib.import_module("openvino").Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    program = core.compile_model(core.read_model(onnx_of(model, x), b""), "CPU", options)
    request, feed = program.create_infer_request(), [x.numpy()]

    def run() -> object:
        return request.infer(feed)

    run()
    same(torch.from_numpy(request.get_output_tensor(0).data.copy()), model, x)
    return run


def same(y: Tensor, model: nn.Module, x: Tensor) -> None:
    """Check that a runtime computes what the model does."""
    with torch.no_grad():
        expected = model(x)
    error = (y - expected).abs().max() / expected.abs().max()
    assert error < 1e-3, f"a relative difference of {error:.1e}"


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "eager": eager,
    "torch.compile, frozen": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}

if __name__ == "__main__":
    main()
