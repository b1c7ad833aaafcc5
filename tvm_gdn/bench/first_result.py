"""``tvm_gdn bench --first-result``: how long a fresh process that has a pack takes to its first result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from tvm_gdn import cases, device
from tvm_gdn.bench import machine
from tvm_gdn.commands import aot, arguments
from tvm_gdn.commands.text import table
from tvm_gdn.errors import KernelError
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import TargetSpec

Case = Mapping[str, Any]

#: What is timed where no operator is named: a decode step and a prefill.
OPERATORS = ("packed_decode_gated_delta_rule", "chunk_gated_delta_rule")
#: Stages of a process after ``import torch``, in order: the package, the device's context, inputs, the first call and its result.
STAGES = ("import_ms", "context_ms", "inputs_ms", "call_ms")

_PROCESS = """
import json, sys, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import tvm_gdn
times.append(time.perf_counter())
op, case, kind = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
from tvm_gdn import device
torch.zeros(1, device=kind)
device.synchronize(kind)
times.append(time.perf_counter())
from tvm_gdn import cases
spec = tvm_gdn.OPS[op]
given = {name: value for name, value in cases.draw(spec, case, device=kind).items() if value is not None}
device.synchronize(kind)
times.append(time.perf_counter())
getattr(tvm_gdn, op)(**given)
device.synchronize(kind)
times.append(time.perf_counter())
from tvm_gdn import dispatch
steps = [1e3 * (end - start) for start, end in zip(times, times[1:])]
names = ("torch_ms", "import_ms", "context_ms", "inputs_ms", "call_ms")
print(json.dumps({**dict(zip(names, steps)), "total_ms": sum(steps[1:]), "served_by": dispatch.served_by(op)}))
"""


def measure(chosen: Sequence[tuple[OpSpec, Case]], target: TargetSpec, runs: int) -> dict[str, Any]:
    """Write a pack of the kernels that cases need, then time fresh processes that have nothing else.

    Parameters
    ----------
    chosen : sequence of (OpSpec, mapping)
        Operators, each with a case.
    target : TargetSpec
        Target that this machine can run.
    runs : int
        Processes for each case.

    Returns
    -------
    dict
        Ready for JSON. By case, each with median, least, most and every value: ``torch_ms`` (``import torch``, which
        does not count), the `STAGES`, and ``total_ms``, their sum: from after ``import torch`` to a result that was waited for.

    Raises
    ------
    KernelError
        A process failed, or the pack did not serve its call.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="tvm_gdn-bench-") as name:
        folder = Path(name)
        geometries = [(spec, arguments.geometry_of_case(spec, case)) for spec, case in chosen]
        aot.build_pack(geometries, target, folder / "pack")
        (folder / "cache").mkdir()
        changes = {
            "TVM_GDN_PACK_PATH": str(folder / "pack"), "TVM_GDN_CACHE_DIR": str(folder / "cache"), "TVM_GDN_DISABLE_JIT": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        found: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(chosen))}
        for _ in tqdm(range(runs), desc="first results", unit="round", disable=None):
            for number, (spec, case) in enumerate(chosen):
                found[number].append(_run(spec, case, target, {**os.environ, **changes}))
    for (spec, case), taken in zip(chosen, found.values(), strict=True):
        times = {stage: _summary([run[stage] for run in taken]) for stage in ("torch_ms", *STAGES, "total_ms")}
        rows.append({"op": spec.name, "case": cases.label(case), "served_by": taken[0]["served_by"], **times})
    return {
        "format": 1, **machine.stamp(), "device": device.name(target.device), "target": target.name, "runs": runs,
        "first_results": rows,
    }  # fmt: skip


def _run(spec: OpSpec, case: Case, target: TargetSpec, environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _PROCESS, spec.name, json.dumps(case), target.device]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    if done.returncode:
        raise KernelError(f"the first call of {spec.name} in a fresh process failed:\n{done.stderr.strip()}")
    taken: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not taken["served_by"].startswith("compiled"):
        raise KernelError(f"the first call of {spec.name} in a fresh process was not served by the pack: {taken['served_by']}")
    return taken


def _summary(values: Sequence[float]) -> dict[str, Any]:
    rounded = [round(value, 3) for value in values]
    return {"median": round(median(values), 3), "min": min(rounded), "max": max(rounded), "all": rounded}


def render(report: Mapping[str, Any]) -> str:
    """Text of what `measure` returns."""
    lines = [
        [
            row["op"], f"{row['total_ms']['median']:.0f}", f"{row['total_ms']['min']:.0f}-{row['total_ms']['max']:.0f}",
            *(f"{row[stage]['median']:.0f}" for stage in STAGES), f"{row['torch_ms']['median']:.0f}",
        ]
        for row in report["first_results"]
    ]  # fmt: skip
    header = ["operator", "ms", "", "import tvm_gdn", "context", "inputs", "call", "(import torch)"]
    where = report["device"] or "CPU"
    return "\n".join(
        (
            f"target {report['target']} on {where}; {machine.line()}; {report['date']}",
            f"From after `import torch` to the first result in a fresh process with a pack, median of {report['runs']} (all).",
            table(header, lines, right=(1, 3, 4, 5, 6, 7)),
            *(f"{row['op']}: {row['case']}; {row['served_by']}" for row in report["first_results"]),
        )
    )
