"""A deployed machine: a second environment with torch, numpy and apache-tvm-ffi but no apache-tvm runs a pack built here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tvm_gdn import build, cases, check, kernel_cache
from tvm_gdn.ops import OPS
from tvm_gdn.target import resolve

ROOT = Path(__file__).resolve().parent.parent
PICKED = ("fused_recurrent_gated_delta_rule_update", "packed_decode_gated_delta_rule", "fused_gdn_gating")

PROGRAM = """
import importlib.util, sys
assert importlib.util.find_spec("tvm") is None, "apache-tvm is installed: this is no runtime-only environment"
import torch, tvm_gdn
from tvm_gdn import load, parity
from tvm_gdn.ops import OPS
for name in {picked!r}:
    result = parity.check_case(OPS[name], OPS[name].cases[0])
    assert result.passed, result
    print(name, result.served)
libraries = {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line or "libiomp" in line}}
assert len(libraries) == 1 and load.openmp_library() in libraries, libraries
assert "libtvm_runtime" not in open("/proc/self/maps").read()
print("served without apache-tvm")
"""


@pytest.mark.slow
def test_pack_runs_without_apache_tvm(tmp_path):
    pack = tmp_path / "pack"
    requests = [build.Request(OPS[n], check.geometry_of(OPS[n], cases.draw(OPS[n], OPS[n].cases[0]))) for n in PICKED]
    kernel_cache.compile_pack(pack, requests, resolve())
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
    subprocess.run([*pip, str(ROOT)], check=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"TVM_GDN_PACK_PATH": str(pack), "TVM_GDN_DISABLE_JIT": "1", "TVM_GDN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-c", PROGRAM.format(picked=PICKED)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "served without apache-tvm" in done.stdout
