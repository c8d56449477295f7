"""Latency and size of several files, measured against each other.

The files take turns in one process, one run each per round, so that a busy machine disturbs all alike; ratios are the
result, milliseconds are only of this machine and moment.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from export import session


@dataclass(frozen=True)
class Latency:
    """Milliseconds per batch (median, 95th percentile), file size in bytes, and speed-up over the first file."""

    name: str
    median_ms: float
    p95_ms: float
    size: int
    speedup: float


def compare(
    models: Mapping[str, onnx.ModelProto],
    images: NDArray[np.float32],
    *,
    threads: int | Mapping[str, int] = 1,
    rounds: int = 50,
    warmup: int = 5,
) -> list[Latency]:
    """Interleaved latencies of `models` on `images` (one batch); the first model is the baseline of the ratios.

    threads: of every file, or by name. The speed-up is the median of the per-round ratios: both terms of a ratio are
    measured milliseconds apart.
    """
    times = interleaved(models, images, threads=threads, rounds=rounds, warmup=warmup)
    baseline = next(iter(times))
    return [
        Latency(
            name,
            float(np.median(taken)),
            float(np.percentile(taken, 95)),
            models[name].ByteSize(),
            speedup(times, name, baseline),
        )
        for name, taken in times.items()
    ]


def speedup(times: Mapping[str, NDArray[np.float64]], name: str, over: str) -> float:
    """How many times faster than `over` the file `name` is: the median of the ratios of each round of `interleaved`."""
    return float(np.median(times[over] / times[name]))


def interleaved(
    models: Mapping[str, onnx.ModelProto],
    images: NDArray[np.float32],
    *,
    threads: int | Mapping[str, int] = 1,
    rounds: int = 50,
    warmup: int = 5,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of every file in each of `rounds` rounds, in which the files take turns; by name, float64 (rounds,).

    images: one batch. threads: of every file, or by name. warmup: rounds before those that count.
    """
    counts = dict.fromkeys(models, threads) if isinstance(threads, int) else threads
    loaded = {
        name: session.load(model, threads=counts[name])
        for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in loaded}
    order = np.random.default_rng(0)
    for turn in range(warmup + rounds):
        # In a new order every round: what ran before leaves the caches warm or cold.
        for name in order.permutation(list(loaded)):
            file = loaded[name]
            began = time.perf_counter()
            file.run(images)
            if turn >= warmup:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: np.array(taken) for name, taken in times.items()}
