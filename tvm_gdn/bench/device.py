"""Times calls on an accelerator: replays of a captured graph, as a serving engine runs them, and calls from Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from tvm_gdn.bench.timing import Timing, summary

Call = Callable[[], object]
#: A sample lasts at least this long, so that the clock's steps and the replay's own launch do not count.
_SAMPLE_SECONDS = 400e-6


def graphs(calls: Mapping[str, Call], seconds: float, rounds: int = 7) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time calls as captured graphs, in rounds of A, B, C, A, B, C.

    Parameters
    ----------
    calls : mapping
        Callables without arguments, by name.
    seconds : float
        Time to spend on each call, all rounds together.
    rounds : int
        Number of rounds.

    Returns
    -------
    dict of Timing
        Device time per call.
    dict of str
        Why others cannot be captured.
    """
    captured, refused = {}, {}
    for name, call in calls.items():
        try:
            captured[name] = _capture(call)
        except Exception as error:
            # A contender that synchronizes or allocates in its own way cannot be captured; it is left out, with its reason.
            torch.cuda.synchronize()
            refused[name] = f"no graph: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _rounds({name: _replay(graph, count) for name, (graph, count) in captured.items()}, seconds, rounds), refused


def eager(calls: Mapping[str, Call], seconds: float, rounds: int = 7) -> dict[str, Timing]:
    """Time calls one after the other, as Python issues them: the longer of launching and running.

    Parameters
    ----------
    calls, seconds, rounds
        As in `graphs`.

    Returns
    -------
    dict of Timing
    """
    return _rounds({name: _issue(call) for name, call in calls.items()}, seconds, rounds)


def _capture(call: Call) -> tuple[torch.cuda.CUDAGraph, int]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for _ in range(3):
            call()
        end.record(stream)
        stream.synchronize()
    count = max(1, min(100, int(_SAMPLE_SECONDS / max(1e-6, start.elapsed_time(end) / 3e3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph, count


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> Callable[[], float]:
    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / count

    return sample


def _issue(call: Call) -> Callable[[], float]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    # Waiting for the device at the end of a sample takes some 50 us, which must not count for every other call.
    count = max(20, min(200, int(2 * _SAMPLE_SECONDS / (time.perf_counter() - start))))

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / count

    return sample


def _rounds(samples: Mapping[str, Callable[[], float]], seconds: float, rounds: int) -> dict[str, Timing]:
    taken: dict[str, list[list[float]]] = {name: [] for name in samples}
    for _ in range(rounds):
        for name, sample in samples.items():
            sample()
            end, found = time.perf_counter() + seconds / rounds, [sample()]
            while time.perf_counter() < end:
                found.append(sample())
            taken[name].append(found)
    return {name: summary(found) for name, found in taken.items()}
