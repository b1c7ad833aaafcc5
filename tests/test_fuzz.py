"""Random calls in a watched process: no crash, no hang, no wrong number, no wrong error (see `tools/fuzz.py`)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from calls import ALGORITHMS
from processes import environment

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

from fuzz_calls import Call  # noqa: E402
from fuzz_kernels import kernels  # noqa: E402

from tvm_gdn.ops import OPS  # noqa: E402

#: One kernel per operator: every one costs a second to compile. Longer runs make calls of more.
DRAWN = kernels(1)
#: Of operators that share an algorithm the first one, and those whose name has its name in it.
USUAL = kernels(1, ALGORITHMS)
ONLY = ["--op", *ALGORITHMS]
KERNELS = [(kernel.spec, kernel.geometry) for kernel in USUAL]


def run(*options):
    return subprocess.run(
        [sys.executable, TOOLS / "fuzz.py", "--kernels", "1", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
    )


@pytest.mark.parametrize(("calls", "only"), [(1000, ONLY), pytest.param(2000, (), marks=pytest.mark.slow)])
def test_thousands_of_calls(calls, only):
    done = run("--calls", calls, "--seed", 0, "--timeout", 60, *only)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{calls} calls of seed 0" in done.stdout
    assert "0 crashes, 0 hangs, 0 wrong results" in done.stdout


def test_calls_are_reproducible_and_of_every_kind():
    calls = [Call(3, index, USUAL) for index in range(400)]
    assert [str(call) for call in calls] == [str(Call(3, index, USUAL)) for index in range(400)]
    valid = [call for call in calls if not call.broken]
    assert 0.4 < len(valid) / len(calls) < 0.8
    assert {call.op for call in valid} == {kernel.spec.name for kernel in USUAL}
    assert len({call.broken.partition(": ")[2] for call in calls}) > 30
    assert run("--seed", 3, "--only", 7, *ONLY).stdout.splitlines()[0] == str(calls[7])


SABOTAGE = """
import os, runpy, sys, time
import torch, tvm_gdn
sys.path.insert(0, {tools!r})
import fuzz_calls
judge = fuzz_calls.Call.judge

def sabotaged(call):
    index = sabotaged.index = getattr(sabotaged, "index", -1) + 1
    if {kind!r} == "crash" and index == 5:
        os.abort()
    if {kind!r} == "hang" and index == 5:
        time.sleep(1000)
    if {kind!r} == "number" and not call.broken:
        original = call._call

        def wrong():
            result = original()
            return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

        call._call = wrong
    return judge(call)

fuzz_calls.Call.judge = sabotaged
sys.argv = [{script!r}, *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["crash", "hang", "number"])
def test_the_fuzzer_sees(kind, tmp_path):
    """The fuzzer with a sabotaged child reports what happens to it, goes on, and fails."""
    script = tmp_path / "fuzz.py"
    wrapper = SABOTAGE.format(tools=str(TOOLS), kind=kind, script=str(TOOLS / "fuzz.py"))
    source = (
        (TOOLS / "fuzz.py").read_text().replace("sys.executable, __file__,", f"sys.executable, {str(tmp_path / 'child.py')!r},")
    )
    script.write_text(source)
    (tmp_path / "child.py").write_text(wrapper)
    done = subprocess.run(
        [sys.executable, script, "--kernels", "1", "--calls", "8", "--seed", "0", "--timeout", "10", *ONLY],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(TOOLS),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    # Every child is sabotaged at its sixth call: the first at call 5; the second makes calls 6 and 7.
    seen = {"crash": "1 crashes, 0 hangs, 0 wrong", "hang": "0 crashes, 1 hangs, 0 wrong", "number": "0 crashes, 0 hangs"}[kind]
    assert seen in done.stdout
    assert f"call 5: {kind}" in done.stdout or kind == "number"
    assert kind == "number" or done.stdout.splitlines()[-1].startswith("7 calls")
    assert kind != "number" or "is off by 1.00e-02" in done.stdout


def test_kernels_are_read_from_every_spec():
    """Sizes that a case may choose leave the kernel as it is; an operator that is added joins without a line here."""
    assert [kernel.spec.name for kernel in DRAWN] == list(OPS)
    assert len(kernels(3, ("conv", "norm"))) == 3 * sum("conv" in name or "norm" in name for name in OPS)
    for kernel in DRAWN:
        assert kernel.free, kernel.spec.name
        for key in kernel.free:
            grown = dataclasses.replace(kernel, case={**kernel.case, key: 11})
            assert grown.geometry == kernel.geometry
