"""Parallel and dual against sequential scan: seconds and peak memory against tokens and channels.

    python benchmarks/scan.py [--quick] [--out rows.jsonl] [--threads 2] [--device cpu]
    python benchmarks/scan.py --shape 256 1000000 --scan parallel   # 1 GiB an array, and six of them
    python benchmarks/scan.py --ratios   # against the sequential scan, and against less tokens or channels, in turn

Every row is measured in a process of its own, so that its peak memory is its own; ``--ratios`` measures what is
compared in one process, a call of each in turn, for a shared machine is at one time twice as fast as at another.
Seconds are the median of five calls (of fewer where these take more than ten seconds: column ``calls``), beside the
processor's own seconds, which a busy machine disturbs less; memory is the peak beyond inputs, with outputs and
gradients. All rows take some minutes on two cores, ``--quick`` some seconds. Rows of the oracle whose kept states would
exceed 4 GiB are left out.

- ``sequential``: the oracle, token after token, differentiated by autograd.
- ``parallel``: `selective_scan` as used by default; ``parallel, torch``: without kernels, where the device has them.
- ``dual``: `dual_scan`, one decay for each of ten groups of channels.
- ``final state``, ``dual final state``: only the state after the last token, forward.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fedsim.sequence.dual import dual_final_state, dual_scan
from fedsim.sequence.scan import final_state, selective_scan_sequential, selective_scan_with_state

STATE_SIZE, GROUPS = 8, 10
SHAPES = [(64, 10_000), (256, 10_000), (1024, 10_000), (4096, 10_000), (256, 1_000), (256, 100_000)]
QUICK_SHAPES = [(64, 1_000), (256, 1_000)]
GROWTH = [[(256, 10_000), (1024, 10_000), (4096, 10_000)], [(256, 10_000), (256, 30_000), (256, 100_000)]]
CALLS, PATIENCE_S = 5, 2.0
# Autograd keeps about this many arrays of [L, d, n] for the oracle's backward pass.
KEPT_BY_ORACLE, MEMORY_LIMIT_MIB = 4, 4096


def _without_read(last: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda x, delta, A, B, C: (last(x, delta, A, B),)


Row = dict[str, Any]
Case = tuple[str, int, int]
"""A scan, its tokens, its channels."""

SCANS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "sequential": selective_scan_sequential,
    "parallel": selective_scan_with_state,
    "parallel, torch": partial(selective_scan_with_state, kind="torch"),
    "dual": dual_scan,
    "final state": _without_read(final_state),
    "dual final state": _without_read(dual_final_state),
}


def _inputs(name: str, tokens: int, channels: int, device: str) -> list[Tensor]:
    """x, delta, A, B, C: for a dual, one delta and A a group, and B and C apart."""
    dual = name.startswith("dual")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, channels, generator=g)
    delta = torch.rand(1, tokens, GROUPS if dual else channels, generator=g).mul_(0.1)
    A = -torch.arange(1, GROUPS + 1).float() if dual else -torch.arange(1, STATE_SIZE + 1).float().repeat(channels, 1)
    B, C = torch.randn(2, 1, tokens, *([GROUPS] if dual else []), STATE_SIZE, generator=g)
    return [t.to(device).requires_grad_() for t in (x, delta, A, B, C)]


def _call(scan: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        result = scan(*inputs)[0]
    if backward:
        torch.autograd.grad(result, inputs, torch.ones_like(result))
    if result.is_cuda:
        torch.cuda.synchronize()


def _used_mib(device: str) -> float:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _machine(device: str) -> Row:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measure(name: str, tokens: int, channels: int, backward: bool, device: str, threads: int) -> Row:
    """One row: a small call to load what is loaded once, then up to `CALLS` timed ones."""
    torch.set_num_threads(threads)
    _call(SCANS[name], _inputs(name, 16, 64 * GROUPS, device), backward)
    inputs = _inputs(name, tokens, channels, device)
    before, seconds, cpu_seconds = _used_mib(device), list[float](), list[float]()
    while len(seconds) < CALLS and (not seconds or sum(seconds) < PATIENCE_S * CALLS):
        start, cpu_start = time.perf_counter(), time.process_time()
        _call(SCANS[name], inputs, backward)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "scan": name,
        "tokens": tokens,
        "channels": channels,
        "state_size": STATE_SIZE,
        "pass": _pass(backward),
        "seconds": round(statistics.median(seconds), 5),
        "seconds_min": round(min(seconds), 5),
        "seconds_max": round(max(seconds), 5),
        "cpu_seconds": round(statistics.median(cpu_seconds), 5),
        "calls": len(seconds),
        "peak_mib": round(_peak_mib(device) - before, 1),
        "threads": threads,
        **_machine(device),
    }


def measure_in_turn(cases: list[Case], backward: bool, device: str, threads: int) -> list[Row]:
    """A row a case, with its ratio to the first of them: the median of those inside each of `CALLS` turns."""
    torch.set_num_threads(threads)
    inputs = [_inputs(*case, device) for case in cases]
    for (name, *_), tensors in zip(cases, inputs, strict=True):
        _call(SCANS[name], tensors, backward)
    turns = [[_seconds(SCANS[name], tensors, backward) for (name, *_), tensors in zip(cases, inputs, strict=True)]
             for _ in range(CALLS)]  # fmt: skip
    rows = []
    for (name, tokens, channels), seconds in zip(cases, zip(*turns, strict=True), strict=True):
        ratios = [own / turn[0] for own, turn in zip(seconds, turns, strict=True)]
        rows.append({
            "scan": name, "tokens": tokens, "channels": channels, "state_size": STATE_SIZE, "pass": _pass(backward),
            "seconds": round(statistics.median(seconds), 5), "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3), "to": cases[0],
            "calls": CALLS, "threads": threads, **_machine(device),
        })  # fmt: skip
    return rows


def _seconds(scan: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], backward: bool) -> float:
    start = time.perf_counter()
    _call(scan, inputs, backward)
    return time.perf_counter() - start


def _pass(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def _worth_it(name: str, tokens: int, channels: int, backward: bool, device: str) -> bool:
    if name == "sequential" and backward:
        return KEPT_BY_ORACLE * tokens * channels * STATE_SIZE * 4 / 2**20 < MEMORY_LIMIT_MIB
    if name == "parallel, torch":
        return device != "cpu"
    return not (backward and name.endswith("final state"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--ratios", action="store_true", help="what is compared, in turn in one process")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("TOKENS", "CHANNELS"), help="this one only")
    parser.add_argument("--scan", nargs="+", choices=SCANS, default=list(SCANS))
    parser.add_argument("--out", type=Path, help="a file for the rows, one JSON object a line")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    shapes = [options.shape] if options.shape else QUICK_SHAPES if options.quick else SHAPES
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # otherwise every row's process imports it again
    rows: list[Row] = []
    for found in (_print_ratios if options.ratios else _print_alone)(options, shapes, context):
        rows += found
        if options.out:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _print_alone(options: argparse.Namespace, shapes: list[tuple[int, int]], context: Any) -> Iterator[list[Row]]:
    columns = f"{'seconds':>10}{'CPU s':>10}{'calls':>7}{'peak MiB':>10}"
    print(f"{'scan':18}{'tokens':>8}{'channels':>10}  {'pass':18}{columns}")
    for backward in (False, True):
        for tokens, channels in shapes:
            for name in (n for n in options.scan if _worth_it(n, tokens, channels, backward, options.device)):
                with context.Pool(1) as pool:
                    row = pool.apply(measure, (name, tokens, channels, backward, options.device, options.threads))
                print(
                    f"{name:18}{tokens:8}{channels:10}  {row['pass']:18}"
                    f"{row['seconds']:10.4f}{row['cpu_seconds']:10.4f}{row['calls']:7}{row['peak_mib']:10.1f}",
                    flush=True,
                )
                yield [row]


def _print_ratios(options: argparse.Namespace, shapes: list[tuple[int, int]], context: Any) -> Iterator[list[Row]]:
    groups: list[list[Case]] = [[(name, *shape) for name in ("sequential", "parallel", "dual")] for shape in shapes]
    for name in ("parallel", "dual") if shapes is SHAPES else ():
        groups += [[(name, tokens, channels) for tokens, channels in growth] for growth in GROWTH]
    print(
        f"{'scan':18}{'tokens':>8}{'channels':>10}  {'pass':18}{'seconds':>10}{'to first':>10}{'least':>8}{'most':>8}"
    )
    for backward in (False, True):
        for group in groups:
            cases = [case for case in group if _worth_it(*case, backward, options.device)]  # the first may be left out
            with context.Pool(1) as pool:
                found = pool.apply(measure_in_turn, (cases, backward, options.device, options.threads))
            for row in found:
                print(
                    f"{row['scan']:18}{row['tokens']:8}{row['channels']:10}  {row['pass']:18}{row['seconds']:10.4f}"
                    f"{row['ratio']:10.3f}{row['ratio_min']:8.3f}{row['ratio_max']:8.3f}",
                    flush=True,
                )
            print()
            yield found


if __name__ == "__main__":
    main()
