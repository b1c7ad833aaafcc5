"""Kernels run on torch's OpenMP threads: one pool, governed by torch; safe from several Python threads and after a fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
import torch
from calls import POOL, RECURRENT, SIGMOID, UPDATE, call, check, draw, same_bits

from tvm_gdn import cases, dispatch, parity
from tvm_gdn.ops import OPS

POOLED = {"B": 8, "T": 4, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 16, "with": POOL}
SEPARATE = {"B": 2, "T": 7, "H": 2, "HV": 4, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
#: One value head of one sequence: its columns are what threads can share. Two panels of 64 in fp32, five of 32 on matrix units.
FEW = {"B": 1, "T": 65, "H": 1, "HV": 1, "K": 64, "with": ("initial_state",), "output_final_state": True}
FEW = [{**FEW, "V": 128, "dtype": "float32"}, {**FEW, "V": 160, "dtype": "bfloat16", "state_v_first": True}]
CHUNK = "chunk_gated_delta_rule"
KERNELS = [
    *((CHUNK, case) for case in FEW),
    (UPDATE, POOLED),
    (SIGMOID, POOLED),
    (UPDATE, {**POOLED, "state_v_first": True}),
    (RECURRENT, SEPARATE),
]

TOOLS = f"""
import os, re, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})

def tasks():
    return sorted(os.listdir("/proc/self/task"), key=int)

def cpu_time(work):
    '''Clock ticks that each thread spends during work: the calling thread's first, the others' in descending order.'''
    def ticks():
        stats = {{task: Path("/proc/self/task", task, "stat").read_text().rpartition(")")[2].split() for task in tasks()}}
        return {{task: int(stat[11]) + int(stat[12]) for task, stat in stats.items()}}
    before = ticks()
    work()
    spent = {{task: ticks - before.get(task, 0) for task, ticks in ticks().items()}}
    main = spent.pop(str(os.getpid()))
    return [main, *sorted(spent.values(), reverse=True)]

def busy(seconds=0.6):
    from calls import UPDATE, call, draw
    a = draw(UPDATE, {{**POOLED, "B": 64, "S": 64, "T": 16}})
    def work():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            call(UPDATE, a)
    return work

def torch_parallel():
    x = torch.randn(1 << 20)
    torch.exp(x)
    (x.view(1024, 1024) @ x.view(1024, 1024)).sum()

POOLED = {POOLED!r}
SEPARATE = {SEPARATE!r}
"""


def run(code, timeout=240, **environment):
    """Run code in a fresh process; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", TOOLS + textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, check=False,
        env=processes.environment(**environment),
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    return done.stdout.split()


def test_torch_governs_the_threads():
    code = """
        from calls import UPDATE, check, draw
        work = busy()
        torch.set_num_threads(1)
        check(UPDATE, draw(UPDATE, POOLED))
        alone = tasks()
        spent = cpu_time(work)
        assert tasks() == alone, "a kernel started threads of its own"
        assert spent[0] > 5 and sum(spent[1:]) <= spent[0] // 10, spent

        torch.set_num_threads(2)
        torch_parallel()
        both = tasks()
        spent = cpu_time(work)
        assert tasks() == both, "a kernel started threads next to torch's"
        assert spent[1] > spent[0] // 4 and sum(spent[2:]) <= spent[0] // 10, spent

        torch.set_num_threads(1)
        spent = cpu_time(work)
        assert tasks() == both
        assert sum(spent[1:]) <= spent[0] // 10, spent

        torch.set_num_threads(3)
        check(UPDATE, draw(UPDATE, POOLED))
        assert len(tasks()) <= len(both) + 1
        print("done")
    """
    assert run(code) == ["done"]


def test_one_openmp_library():
    code = """
        import tvm_gdn
        from tvm_gdn import load
        from calls import UPDATE, check, draw
        assert load.openmp_library() is None
        torch_parallel()
        check(UPDATE, draw(UPDATE, POOLED))
        names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        found = {name for name in names if re.match(r"lib(gomp|iomp5|omp)\\b", Path(name).name)}
        assert len(found) == 1, found
        assert Path(load.openmp_library()).resolve() == Path(*found).resolve()
        assert not any("libtvm_runtime" in name or "libtvm_compiler" in name for name in names)
        assert "tvm" not in sys.modules
        print("done")
    """
    assert run(code) == ["done"]


@pytest.mark.parametrize("first", ["tvm", "kernel"])
def test_importing_tvm_changes_nothing(first):
    code = f"""
        from calls import UPDATE, check, draw
        torch.set_num_threads(2)
        torch_parallel()
        if {first == "kernel"}:
            check(UPDATE, draw(UPDATE, POOLED))
        import tvm
        before = tasks()
        check(UPDATE, draw(UPDATE, POOLED))
        # A kernel that is loaded after the import, too.
        check(UPDATE, draw(UPDATE, {{**POOLED, "state_v_first": True}}))
        spent = cpu_time(busy())
        assert tasks() == before, "kernels run on TVM's own pool"
        assert spent[1] > spent[0] // 4 and sum(spent[2:]) <= spent[0] // 10, spent
        torch.set_num_threads(1)
        spent = cpu_time(busy())
        assert sum(spent[1:]) <= spent[0] // 10, spent
        print("done")
    """
    assert run(code) == ["done"]


@pytest.mark.parametrize("order", ["kernel-before-fork", "kernel-after-fork"])
def test_a_forked_child_computes(order):
    code = f"""
        import multiprocessing
        import numpy as np
        from calls import UPDATE, call, check, draw, oracle
        torch.set_num_threads(2)
        torch_parallel()
        if {order == "kernel-before-fork"}:
            busy(0.05)()
        work = [draw(UPDATE, {{**POOLED, "B": 2, "S": 3}}, seed=seed) for seed in range(10)]
        want = [oracle(UPDATE, a) for a in work]

        def child():
            # numpy compares: torch's own parallel operators hang in a forked child.
            for a, expected in zip(work, want):
                for name, value in call(UPDATE, a).items():
                    np.testing.assert_allclose(value.numpy(), expected[name].numpy(), rtol=0, atol=1e-5)

        for _ in range(2):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(60)
            hangs = process.is_alive()
            process.kill()
            assert not hangs, "the child hangs"
            assert process.exitcode == 0
        check(UPDATE, draw(UPDATE, POOLED))
        spent = cpu_time(busy())
        assert spent[1] > spent[0] // 4, "the parent lost its threads"
        print("done")
    """
    assert run(code, timeout=200) == ["done"]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case["dtype"])
def test_columns_of_few_heads_are_shared(case):
    before, a = torch.get_num_threads(), draw(CHUNK, case)
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            result = parity.check_case(OPS[CHUNK], case)
            assert result.passed, (threads, result.errors, result.limits)
            found.append(call(CHUNK, cases.clone(a)))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        assert all(same_bits(got[name], value) for name, value in found[0].items())


def test_calls_from_several_threads():
    work = [
        (op, draw(op, {**case, "B": 2 + n}, seed=n))
        for n in range(4)
        for op, case in ((UPDATE, POOLED), (SIGMOID, POOLED), (RECURRENT, SEPARATE))
    ]
    want = [check(op, cases.clone(a)) for op, a in work]
    for _ in range(3):
        dispatch.reset()  # the first calls race too: for the table of kernels, and for loading
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                got = list(pool.map(lambda item: call(item[0], cases.clone(item[1])), work))
                for result, expected in zip(got, want, strict=True):
                    assert all(same_bits(result[name], value) for name, value in expected.items())


def test_several_threads_share_a_pool_by_slots():
    a = draw(UPDATE, POOLED)
    want = check(UPDATE, cases.clone(a))
    names = ("q", "k", "v", "g", "beta")

    def one(n):
        rows = {name: a[name][n : n + 1] for name in names}
        return call(UPDATE, {**a, **rows, "initial_state_indices": a["initial_state_indices"][n : n + 1]})["o"]

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(one, range(8)))
    assert same_bits(torch.cat(outputs), want["o"])
    assert same_bits(a["initial_state_source"], want["initial_state_source"])


def test_inside_a_parallel_region_of_torch_threads_stay_few():
    """Python threads beyond torch's own get the same setting, and no thread leaks from call to call."""
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from calls import UPDATE, call, check, draw
        torch.set_num_threads(2)
        a = draw(UPDATE, POOLED)
        check(UPDATE, draw(UPDATE, POOLED))
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda n: call(UPDATE, draw(UPDATE, POOLED, seed=n)), range(64)))
        # 4 callers came and went; each had one helper of its own, which OpenMP keeps or ends as it likes.
        assert len(tasks()) <= 2 + 2 * 4 + 2, tasks()
        print("done")
    """
    assert run(code) == ["done"]
