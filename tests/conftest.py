"""Target, cache and kernels of a test run.

``pytest --target NAME`` runs every test on one target, named explicitly, so that a call which the target cannot serve raises
instead of passing on the torch reference. Where NAME is an accelerator that this machine lacks, its device code runs emulated on
the CPU: parity only, at small shapes (modules with ``EMULATED = True``). What the collected tests will call is compiled in one batch before the first of them:
a module lists its kernels as ``KERNELS = [(operator, case), ...]``, a parametrized test takes one as its argument ``kernel``.
(Or as pairs of SPEC and geometry.) One of another target than that under test is the argument ``elsewhere``: (target, operator, case).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sampling
from filelock import FileLock

from tvm_gdn import cases, check, env, kernel_cache
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry, OpSpec
from tvm_gdn.target import TargetSpec, concrete, emulation_of, resolve, runnable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", default=None, help="target under test; default TVM_GDN_TARGET, else what fits this CPU")
    parser.addoption("--slow", action="store_true", help="run tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")
    config.addinivalue_line("markers", "sampled(pairs=False): of this matrix a run without --slow has a part; see sampling.py")
    text = config.getoption("--target") or env.target_name()
    # Two workers have twice as many threads as the machine has cores: who waits for another thread must not keep it from running.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["TVM_GDN_TARGET"] = text if text.startswith("{") else _runnable(resolve(text)).name
    if "TVM_GDN_CACHE_DIR" not in os.environ:
        # Workers of pytest-xdist inherit the environment, and with it this one folder.
        folder = tempfile.mkdtemp(prefix="tvm_gdn-tests-")
        os.environ["TVM_GDN_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def _runnable(target: TargetSpec) -> TargetSpec:
    lacks_device = target.device != "cpu" and target.missing()
    return runnable(emulation_of(concrete(target)) if lacks_device else target)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        sampling.mark(items)
        skip = pytest.mark.skip(reason="slow; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
    if resolve(env.target_name()).emulated:
        skip = pytest.mark.skip(reason="no part of what runs emulated")
        for item in items:
            if not getattr(item.getparent(pytest.Module).obj, "EMULATED", False):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> None:
    """Compile, once for all workers, the kernels that the collected tests need."""
    slow = request.config.getoption("--slow")
    items = [item for item in request.session.items if slow or "slow" not in item.keywords]
    target = resolve(env.target_name())
    if target.emulated:
        items = [item for item in items if getattr(item.getparent(pytest.Module).obj, "EMULATED", False)]
    wanted: dict[TargetSpec, list[tuple[Any, Any]]] = {target: []}
    for module in {item.getparent(pytest.Module) for item in items}:
        wanted[target] += getattr(getattr(module, "obj", None), "KERNELS", ())
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "kernel" in params:
            wanted[target].append(params["kernel"])
        if "elsewhere" in params:
            wanted.setdefault(resolve(params["elsewhere"][0]), []).append(params["elsewhere"][1:])
    if not any(wanted.values()):
        return
    folder = Path(env.cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(done: int, missing: int) -> None:
        with capture.global_and_fixture_disabled():
            print(f"tests: {done} of {missing} kernels compiled", file=sys.stderr, flush=True)

    with FileLock(folder / "tests.lock"):
        failed = {one: kernel_cache.prebuild(_geometries(kernels), one, progress=tell) for one, kernels in wanted.items()}
    # A device's schedule may refuse a geometry (shared memory), a compiler may be missing; the test of that case says so.
    assert target.emulated or not failed[target], "\n".join(failed[target])


def _geometries(kernels: Iterable[tuple[Any, Any]]) -> list[tuple[OpSpec, Geometry]]:
    return [
        (op, case) if isinstance(case, Geometry) else (OPS[op], check.geometry_of(OPS[op], cases.draw(OPS[op], case)))
        for op, case in kernels
    ]


@pytest.fixture(scope="session")
def device() -> str:
    """Torch device type of the target under test."""
    return resolve(env.target_name()).device
