"""Time and memory of candidates that take turns, to be compared within one run only."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(step: Callable, device: torch.device) -> float:
    """
    Duration of a step. On one thread of a CPU it is the time that the process computes, which other work on the
    machine hardly lengthens; on several the time on the clock; on a GPU that until all that the step started is done.
    """
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return clock() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, in which each has one turn. Whoever calls has warmed them up."""
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of every candidate's times."""
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Callable, device: torch.device) -> int:
    """Largest number of bytes alive in torch's allocator during a step, less those alive before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = list(recorded.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(size for _, size in sorted(sizes)), default=0)


def time_and_memory(steps: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """
    Medians in seconds, and peaks in 10**6 bytes, which are counted while the steps warm up. With 0 rounds the warm-up
    is what is timed: counting adds some milliseconds, which do not show where a step takes many seconds.
    """
    peaks = {}

    def count(name: str) -> None:
        peaks[name] = peak_bytes(steps[name], device) / 1e6

    counts = {name: functools.partial(count, name) for name in steps}
    first = interleaved(counts, device, rounds=1)
    times = medians(interleaved(steps, device, rounds) if rounds > 0 else first)
    return {name: {"seconds": times[name], "peak_mb": peaks[name]} for name in steps}


def log_slope(x: list[float], y: list[float]) -> float:
    """The p of y = c * x**p that fits best: 0 for what does not grow, 1 for what grows in proportion."""
    x, y = ([math.log(value) for value in values] for values in (x, y))
    return statistics.linear_regression(x, y).slope
