"""Compares fipo.future_kl with the matrix definition and the paper's chunked listing.

python scripts/bench_future_kl.py     # writes assets/results/future_kl.csv; about two minutes, 7 GB

The three methods run on the same random Δ. The CSV has their time, peak memory and error, and the
first two as multiples of those of fipo.future_kl, which the CSV calls `scan`.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from fipo import future_kl

CSV = Path(__file__).parents[1] / "assets" / "results" / "future_kl.csv"
B = 16
TAU = 32.0


def by_doubling(delta: torch.Tensor, tau: float) -> torch.Tensor:
    """fipo.future_kl: log2 T passes, each of which doubles the number of terms. O(B·T) memory."""
    return future_kl(delta, torch.ones_like(delta), tau)


def by_matrix(delta: torch.Tensor, tau: float) -> torch.Tensor:
    """The definition: a product with the matrix of γ^(k − t), k ≥ t. O(B·T²) work, O(T²) memory."""
    t = torch.arange(delta.shape[1], device=delta.device)
    # One expression, so that no intermediate [T, T] stays in memory.
    decay = torch.exp2(-(t[:, None] - t).clamp(min=0) / tau).tril()  # [T, T]: row k, column t
    return delta @ decay


def by_listing(delta: torch.Tensor, tau: float, chunk: int = 128) -> torch.Tensor:
    """The paper's listing, as the paper describes it: one chunk of decay weights after another.

    The weights of a chunk are [T, chunk]. O(B·T²) work.
    """
    T = delta.shape[1]
    gamma = 2 ** (-1 / tau)
    t = torch.arange(T, device=delta.device)
    F = torch.zeros_like(delta)
    for start in range(0, T, chunk):
        k = t[start : start + chunk]
        distance = k - t[:, None]  # [T, chunk]
        weight = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
        F += delta[:, start : start + chunk] @ weight.T
    return F


# name in the CSV, function, repeats. `scan` is first, because the others are compared with it.
METHODS = [("scan", by_doubling, 51), ("matrix", by_matrix, 3), ("listing", by_listing, 3)]


def in_float64(delta: torch.Tensor, tau: float) -> torch.Tensor:
    """The recurrence F_t = Δ_t + γ F_(t+1), token by token, in float64."""
    gamma = 2 ** (-1 / tau)
    F = delta.to(torch.float64, copy=True)
    for t in reversed(range(delta.shape[1] - 1)):
        F[:, t] += gamma * F[:, t + 1]
    return F


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of one call, after one that warms up."""
    run()
    synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that exist at once during a call, beyond those from before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocated = 0
    peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def print_row(row: dict[str, Any]) -> None:
    """Print a row of results with three digits."""
    words = []
    for name, value in row.items():
        words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    print("  ".join(words), flush=True)


def measure(T: int, device: str) -> list[dict[str, Any]]:
    """Measure the three methods on rows of T tokens."""
    delta = 0.1 * torch.randn(B, T, device=device)
    exact = in_float64(delta, TAU)
    scale = in_float64(delta.abs(), TAU)
    rows = []
    for name, method, repeats in METHODS:
        run = functools.partial(method, delta, TAU)
        row = {"device": device, "B": B, "T": T, "method": name}
        row["seconds"] = seconds(run, repeats)
        row["peak_bytes"] = peak_bytes(run)
        row["error"] = ((run() - exact).abs() / scale).max().item()
        rows.append(row)
        for what in ("seconds", "peak_bytes"):
            row[f"{what}_over_scan"] = row[what] / rows[0][what]
        print_row(row)
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = []
    for T in (1024, 4096, 20480):
        rows += measure(T, device)
    pandas.DataFrame(rows).to_csv(CSV, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
