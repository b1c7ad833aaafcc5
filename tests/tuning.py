"""Stand-ins for tests of tuning, run by path.

``tuning.py scripted LOG PAUSE FOLDER`` answers as a measuring process without compiling anything; ``tuning.py fragile FOLDER``
is a real one whose schedule has bad candidates; ``tuning.py tune LOG PAUSE ...`` is ``tvm_gdn tune ...`` on the scripted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

DEFAULT = {"rows": 16, "kind": 0}


class Scripted:
    """A design space of 12 points for `scripted`."""

    @staticmethod
    def knobs(geometry):
        return {"rows": (1, 4, 16, 64), "kind": (0, 1, 2)}

    @staticmethod
    def default(geometry):
        return dict(DEFAULT)


class Fragile:
    """Gating with candidates that abort the compiler, cannot be built, skip the last rows, and one that is right."""

    KINDS = ("right", "abort", "refuse", "skip")

    @staticmethod
    def knobs(geometry):
        return {"rows_per_worker": (16,), "kind": Fragile.KINDS}

    @staticmethod
    def default(geometry):
        return {"rows_per_worker": 16, "kind": "right"}

    @staticmethod
    def tiles(geometry, *, rows_per_worker, kind):
        from tvm_gdn.schedules.cpu_gating import GatingTiles

        class Skipping(GatingTiles):
            def workers(self, count):
                return super().workers(count - 1)

        if kind == "abort":
            os.abort()
        if kind == "refuse":
            raise ValueError("this tile does not exist\nand more lines")
        return (Skipping if kind == "skip" else GatingTiles)(rows_per_worker, 16)


def register(space, target):
    """Have `space` shape the gating kernels of a target."""
    from tvm_gdn import schedule

    schedule.schedule("gating", target)(space)


def scripted(log: Path, pause: float) -> None:
    """Answer requests; every candidate that is timed in a trial becomes a line of the log.

    Points (4, *) are faster than the default, (1, 2) hangs, (1, 1) dies, (64, 1) gives wrong numbers, (4, 2) seems the fastest
    but is not right on other geometries, (64, 2) seems fast in its trial only.
    """

    def us(knobs: dict, final: bool) -> float:
        if knobs == {"rows": 64, "kind": 2}:
            return 200.0 if final else 50.0
        return {1: 130.0, 4: 80.0, 16: 100.0, 64: 140.0}[knobs["rows"]] - 10 * knobs["kind"] * (knobs["rows"] == 4)

    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if request["do"] in {"prepare", "prepare_others"}:
            point = (request["knobs"]["rows"], request["knobs"]["kind"])
            if point == (1, 2):
                sys.stdin.read()  # ends when the parent does
                return
            elif point == (1, 1):
                print("LLVM ERROR: Cannot select", file=sys.stderr, flush=True)
                os.abort()
            elif point == (64, 1) or (point == (4, 2) and request["do"] == "prepare_others"):
                answer["error"] = f"wrong numbers of {point}"
        elif request["do"] == "time":
            final = len(request["candidates"]) > 1
            if not final:
                time.sleep(pause)
                with log.open("a") as file:
                    file.write(json.dumps(request["candidates"][0]) + "\n")
            # Two benchmark shapes: the objective is the geometric mean of their times.
            rows = [[us(knobs, final) / 2, us(knobs, final) * 2] for knobs in request["candidates"]]
            answer = {"us": rows, "ratio": [[a / b for a, b in zip(row, rows[0], strict=True)] for row in rows]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def command(kind: str, *arguments: object) -> tuple[str, ...]:
    """Command line of a stand-in."""
    return (sys.executable, str(Path(__file__).resolve()), kind, *map(str, arguments))


def main() -> int:
    kind = sys.argv[1]
    if kind == "scripted":
        with contextlib.suppress(BrokenPipeError):
            scripted(Path(sys.argv[2]), float(sys.argv[3]))
        return 0
    from tvm_gdn import cli, env
    from tvm_gdn.target import resolve
    from tvm_gdn.tuning import measure, worker

    target = resolve(env.target_name()).name
    if kind == "fragile":
        register(Fragile, target)
        sys.argv[1:] = sys.argv[2:]
        return measure.main() or 0
    register(Scripted, target)
    worker.COMMAND = command("scripted", *sys.argv[2:4])
    return cli.main(["tune", "--op", "fused_gdn_gating", *sys.argv[4:]])


if __name__ == "__main__":
    sys.exit(main())
