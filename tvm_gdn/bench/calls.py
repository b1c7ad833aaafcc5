"""What a call costs: above the bare kernel, and for the first time in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import cases, dispatch, env, kernel_cache
from tvm_gdn.bench import contenders
from tvm_gdn.bench.timing import Timing, difference, interleaved
from tvm_gdn.commands import arguments
from tvm_gdn.digest import version_of
from tvm_gdn.errors import KernelError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import resolve, runnable

Case = Mapping[str, Any]

#: The operator whose first call is timed.
_FIRST = "packed_decode_gated_delta_rule"


def tiny_case(spec: OpSpec) -> dict[str, Any]:
    """The operator's first benchmark shape with every axis as small as it gets."""
    case = arguments.small_case(spec, spec.bench[0])
    return {name: spec.smallest.get(name, value) for name, value in case.items()}


def call_cost(spec: OpSpec, case: Case, seconds: float) -> dict[str, Any]:
    """What a call costs above the bare kernel, in microseconds on one thread, and where it goes.

    Returns
    -------
    dict
        ``public``, ``operator`` (torch operator), ``kernel`` and ``allocation`` (outputs) as medians, ``overhead``:
        public minus kernel.
    """
    inputs = contenders.steady(spec, case)
    served, kernel = contenders.kernel_call(spec, inputs)
    if kernel is None:
        raise KernelError(f"{spec.name} is not served by compiled code: {served}")
    calls = {
        "public": contenders.public_call(spec, inputs),
        "operator": contenders.operator_call(spec, inputs),
        "kernel": kernel,
        "allocation": contenders.allocation_call(spec, inputs),
    }
    threads = torch.get_num_threads()
    # On several threads the kernel mostly waits for them to start, which drowns what is measured here.
    torch.set_num_threads(1)
    try:
        times: dict[str, Timing] = interleaved(calls, seconds, rounds=15)
    finally:
        torch.set_num_threads(threads)
    return {
        "op": spec.name, "case": cases.label(case), **{name: round(timing.us, 3) for name, timing in times.items()},
        "overhead": round(difference(times["public"], times["kernel"]), 3),
    }  # fmt: skip


_FIRST_CALL = """
import json, sys, time
import tvm_gdn
start = time.perf_counter()
from tvm_gdn import cases, device, dispatch
from tvm_gdn.bench import contenders
spec = tvm_gdn.OPS[sys.argv[1]]
call = contenders.public_call(spec, cases.draw(spec, json.loads(sys.argv[2]), device=sys.argv[3]))
device.synchronize(sys.argv[3])
ready = time.perf_counter()
call()
device.synchronize(sys.argv[3])
end = time.perf_counter()
milliseconds = {"from_import_ms": 1e3 * (end - start), "call_ms": 1e3 * (end - ready)}
print(json.dumps({**milliseconds, "served_by": dispatch.served_by(spec.name)}))
"""


def first_calls(kind: str = "cpu") -> dict[str, Any]:
    """Time of the first call in a fresh process, with its kernel in a pack, and with nothing but the compiler.

    Returns
    -------
    dict
        ``pack`` and ``compiler`` (None where it is not installed), each with ``from_import_ms`` (from ``import
        tvm_gdn`` to the result, inputs included), ``call_ms``, ``served_by`` and ``log``.
    """
    spec = OPS[_FIRST]
    case = arguments.small_case(spec, spec.bench[0])
    target = runnable(resolve(env.target_name(), kind))
    geometry = arguments.geometry_of_case(spec, case)
    dispatch.lookup(spec, geometry, target.device)
    # A kernel of the cache is a pack of one; where a pack served the call above, that pack serves again.
    single = kernel_cache.folder_of(spec, geometry, target)
    path = os.pathsep.join(map(str, [*env.pack_path(), *([single] if single.is_dir() else [])]))
    found: dict[str, Any] = {"op": spec.name, "geometry": str(geometry)}
    found["pack"] = _first_call(spec, case, kind, {"TVM_GDN_PACK_PATH": path, "TVM_GDN_DISABLE_JIT": "1"})
    found["compiler"] = None
    if version_of("apache-tvm") != "none":
        with tempfile.TemporaryDirectory(prefix="tvm_gdn-bench-") as empty:
            changes = {
                "TVM_GDN_CACHE_DIR": empty,
                "TVM_GDN_PACK_PATH": "",
                "TVM_GDN_DISABLE_JIT": "0",
                "TVM_GDN_LOG": "INFO",
            }
            found["compiler"] = _first_call(spec, case, kind, changes)
    return found


def _first_call(spec: OpSpec, case: Case, kind: str, changes: Mapping[str, str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}
    command = [sys.executable, "-c", _FIRST_CALL, spec.name, json.dumps(case), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise KernelError(f"the first call in a fresh process failed:\n{done.stderr.strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr.strip().splitlines()}
