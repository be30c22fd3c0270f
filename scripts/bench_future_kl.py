"""Future-KL alone: the block scan of fipo.py against the matrix definition and the paper's chunked listing.

python scripts/bench_future_kl.py     # writes assets/results/future_kl.csv; about two minutes, 7 GB
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from fipo import future_kl

CSV = Path(__file__).parents[1] / "assets" / "results" / "future_kl.csv"
B, TAU = 16, 32.0


def by_matrix(delta: torch.Tensor, tau: float) -> torch.Tensor:
    """The definition: one product with the whole matrix of γ^(k − t), k ≥ t. O(B·T²) work, O(T²) memory."""
    t = torch.arange(delta.shape[1], device=delta.device)
    decay = torch.exp2(-(t[:, None] - t).clamp(min=0) / tau).tril()  # [T, T]: row k, column t
    return delta @ decay


def by_listing(delta: torch.Tensor, tau: float, chunk: int = 128) -> torch.Tensor:
    """The paper's listing, from its description: decay weights [T, chunk], chunk after chunk. O(B·T²) work."""
    T, gamma = delta.shape[1], 2 ** (-1 / tau)
    t, F = torch.arange(T, device=delta.device), torch.zeros_like(delta)
    for start in range(0, T, chunk):
        k = t[start : start + chunk]
        distance = k - t[:, None]  # [T, chunk]
        weight = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)
        F += delta[:, start : start + chunk] @ weight.T
    return F


def by_scan(delta: torch.Tensor, tau: float) -> torch.Tensor:
    return future_kl(delta, torch.ones_like(delta), tau)


def in_float64(delta: torch.Tensor, tau: float) -> torch.Tensor:
    """The recurrence, token by token."""
    F, delta = torch.zeros(*delta.shape, dtype=torch.float64, device=delta.device), delta.double()
    after = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        after = F[:, t] = delta[:, t] + 2 ** (-1 / tau) * after
    return F


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of one call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run(), wait()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(), wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during one call, without those that were there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows: list[dict] = []
    for T in (1024, 4096, 20480):
        delta = 0.1 * torch.randn(B, T, device=device)
        exact, scale = in_float64(delta, TAU), in_float64(delta.abs(), TAU)
        for name, method, repeats in (("scan", by_scan, 51), ("matrix", by_matrix, 3), ("listing", by_listing, 3)):
            run = functools.partial(method, delta, TAU)
            row = {"device": device, "B": B, "T": T, "method": name, "seconds": seconds(run, repeats),
                   "peak_bytes": peak_bytes(run), "error": ((run() - exact).abs() / scale).max().item()}  # fmt: skip
            scan = rows[-1 - ["matrix", "listing"].index(name)] if name != "scan" else row
            row |= {f"{what}_over_scan": row[what] / scan[what] for what in ("seconds", "peak_bytes")}
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
    datasets.Dataset.from_list(rows).to_csv(CSV)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
