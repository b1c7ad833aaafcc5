"""Makes random calls, valid and invalid, in watched processes: no crash, no hang, no wrong number, no wrong error.

::

    python tools/fuzz.py --calls 2000 --seed 0              # exit status 1 if anything was wrong
    python tools/fuzz.py --calls 100000 --seed 1 --jobs 2
    python tools/fuzz.py --seed 1 --only 4711               # one call again, in this process
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

#: A run that fails this often is stopped: every crash costs the start of a process.
MAX_FAILURES = 50
#: No call may compile; and threads that wait for work sleep, so that jobs do not take each other's cores.
_ENVIRONMENT = {"TVM_GDN_DISABLE_JIT": "1", "TVM_GDN_LOG": "WARNING", "OMP_WAIT_POLICY": "passive"}
#: Importing torch may take long on a busy machine; after that a call has `--timeout` seconds.
_START_TIMEOUT = 300.0
#: What a child tells its parent in a shared page: the index of the call it is about to make, whether it has begun, and what
#: it has made.
_PAGE = struct.Struct("5q")
_FIELDS = ("valid", "invalid", "wrong")


@dataclass(frozen=True)
class Drawn:
    """Which calls: of a seed, on so many kernels per operator, of operators whose names have a text in them."""

    seed: int
    kernels: int
    ops: tuple[str, ...]

    def options(self) -> list[str]:
        """Command line that says the same."""
        return ["--seed", str(self.seed), "--kernels", str(self.kernels), *(["--op", *self.ops] if self.ops else [])]


class Watch:
    """One job: a range of calls, made by one child process after another."""

    def __init__(self, drawn: Drawn, calls: range, timeout: float, end: float, failures: list[str], counts: Counter[str]) -> None:
        self.drawn, self.calls, self.timeout, self.end = drawn, calls, timeout, end
        self.failures, self.counts = failures, counts

    def run(self) -> None:
        """Make every call of the range, in a new process after each crash or hang."""
        start = self.calls.start
        while start < self.calls.stop and len(self.failures) < MAX_FAILURES:
            start = self._run_child(start)

    def _run_child(self, start: int) -> int:
        with tempfile.NamedTemporaryFile() as page, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
            page.write(_PAGE.pack(start, 0, 0, 0, 0).ljust(mmap.PAGESIZE, b"\0"))
            page.flush()
            shared = mmap.mmap(page.fileno(), mmap.PAGESIZE)
            child = subprocess.Popen(
                [sys.executable, __file__, "--worker", page.name, "--calls", f"{self.calls.stop}", *self.drawn.options()],
                stdout=output, stderr=log, env={**os.environ, **_ENVIRONMENT},
            )  # fmt: skip
            hangs = self._wait(child, shared)
            reached, _, *made = _PAGE.unpack_from(shared)
            self.counts.update(dict(zip(_FIELDS, made, strict=True)))
            output.seek(0)
            self.failures.extend(json.loads(line) for line in output)
            if child.returncode == 0 or time.monotonic() > self.end:
                return self.calls.stop
            log.seek(0)
            kind = "hang" if hangs else f"crash (exit status {child.returncode})"
            self.counts.update({"hangs" if hangs else "crashes": 1})
            self.failures.append(f"call {reached}: {kind}\n{log.read()[-1500:]}")
            return reached + 1

    def _wait(self, child: subprocess.Popen[bytes], shared: mmap.mmap) -> bool:
        """Wait for the child's end; whether it had to be killed because a call took too long."""
        last, since = (-1, 0), time.monotonic()
        while True:
            try:
                child.wait(0.2)
                return False
            except subprocess.TimeoutExpired:
                now = _PAGE.unpack_from(shared)[:2]
                if time.monotonic() > self.end:
                    child.kill()
                    child.wait()
                    return False
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > (self.timeout if now[1] else _START_TIMEOUT):
                    child.kill()
                    child.wait()
                    return True


def work(page: Path, drawn: Drawn, stop: int) -> None:
    """Make calls in this process, from the index in the page on; failures go to stdout as JSON lines."""
    import faulthandler

    import torch
    from fuzz_calls import Call
    from fuzz_kernels import kernels

    faulthandler.enable()
    choice = kernels(drawn.kernels, drawn.ops)
    counts: Counter[str] = Counter()
    with page.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    for index in range(_PAGE.unpack_from(shared)[0], stop):
        _PAGE.pack_into(shared, 0, index, 1, *(counts[field] for field in _FIELDS))
        if index % 500 == 0:
            torch.set_num_threads(1 + index // 500 % 2)
        call = Call(drawn.seed, index, choice)
        description = str(call)
        try:
            problem = call.judge()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        counts["invalid" if call.broken else "valid"] += 1
        if problem:
            counts["wrong"] += 1
            print(json.dumps(f"call {index}: {problem}\n    {description}"), flush=True)
        if counts["wrong"] >= MAX_FAILURES:
            break
    _PAGE.pack_into(shared, 0, stop, 1, *(counts[field] for field in _FIELDS))


def make_again(drawn: Drawn, index: int) -> int:
    """Make one call in this process and tell everything about it."""
    from fuzz_calls import Call
    from fuzz_kernels import kernels

    call = Call(drawn.seed, index, kernels(drawn.kernels, drawn.ops))
    print(call)
    problem = call.judge()
    print(problem or "fine")
    return bool(problem)


def fuzz(calls: int, drawn: Drawn, jobs: int, timeout: float, limit: float) -> int:
    """Make calls 0 to `calls`, or as many as `limit` seconds allow; print a summary; 1 if anything was wrong."""
    from fuzz_kernels import kernels

    from tvm_gdn import env, kernel_cache
    from tvm_gdn.target import resolve

    wanted = [(kernel.spec, kernel.geometry) for kernel in kernels(drawn.kernels, drawn.ops)]
    failed = kernel_cache.prebuild(wanted, resolve(env.target_name()))
    if failed:
        print("\n".join(failed))
        return 1
    failures: list[str] = []
    counts: Counter[str] = Counter()
    start = time.monotonic()
    bounds = [calls * job // jobs for job in range(jobs + 1)]
    stopped = threading.Event()

    def progress() -> None:
        while not stopped.wait(30):
            print(f"{time.monotonic() - start:.0f} s, {len(failures)} failures", file=sys.stderr)

    threading.Thread(target=progress, daemon=True).start()
    with ThreadPoolExecutor(jobs) as pool:
        watches = [Watch(drawn, range(*pair), timeout, start + limit, failures, counts) for pair in itertools.pairwise(bounds)]
        for future in [pool.submit(watch.run) for watch in watches]:
            future.result()
    stopped.set()
    seconds = time.monotonic() - start
    for failure in failures:
        print(failure)
    made = counts["valid"] + counts["invalid"]
    print(
        f"{made} calls of seed {drawn.seed} ({counts['valid']} valid, {counts['invalid']} invalid) in {seconds:.1f} s, "
        f"{made / seconds:.0f} a second: {counts['crashes']} crashes, {counts['hangs']} hangs, {counts['wrong']} wrong results"
    )
    return int(bool(failures) or (seconds < limit and made + counts["crashes"] + counts["hangs"] != calls))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="which calls (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a call counts as hanging (default 60)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the summary says how many were made")
    parser.add_argument("--only", type=int, metavar="INDEX", help="make this call alone, in this process")
    parser.add_argument("--kernels", type=int, default=2, help="kernels per operator, the same in every run (default 2)")
    parser.add_argument(
        "--op", nargs="+", default=(), metavar="TEXT", help="operators whose names have one of these texts in them"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    drawn = Drawn(args.seed, args.kernels, tuple(args.op))
    if args.worker:
        work(args.worker, drawn, args.calls)
        return 0
    if args.only is not None:
        return make_again(drawn, args.only)
    return fuzz(args.calls, drawn, max(1, args.jobs), args.timeout, args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
