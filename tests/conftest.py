"""Target, cache and kernels of a test run.

``pytest --target NAME`` runs every test on one target, named explicitly, so that a call which the target cannot serve raises
instead of passing on the torch reference. Where NAME is an accelerator that this machine lacks, its device code runs emulated on
the CPU: parity only, at small shapes (modules with ``EMULATED = True``). What the collected tests will call is compiled in one batch before the first of them:
a module lists its kernels as ``KERNELS = [(operator, case), ...]``, a parametrized test takes one as its argument ``kernel``.
(Or as pairs of SPEC and geometry.)
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tvm_gdn import cases, check, env, kernel_cache
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry
from tvm_gdn.target import TargetSpec, concrete, emulation_of, resolve, runnable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", default=None, help="target under test; default TVM_GDN_TARGET, else what fits this CPU")
    parser.addoption("--slow", action="store_true", help="run tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")
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
    if resolve(env.target_name()).emulated:
        items = [item for item in items if getattr(item.getparent(pytest.Module).obj, "EMULATED", False)]
    wanted = []
    for module in {item.getparent(pytest.Module) for item in items}:
        wanted += getattr(getattr(module, "obj", None), "KERNELS", ())
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "kernel" in callspec.params:
            wanted.append(callspec.params["kernel"])
    if not wanted:
        return
    folder = Path(env.cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [
        (op, case) if isinstance(case, Geometry) else (OPS[op], check.geometry_of(OPS[op], cases.draw(OPS[op], case)))
        for op, case in wanted
    ]
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(done: int, missing: int) -> None:
        with capture.global_and_fixture_disabled():
            print(f"tests: {done} of {missing} kernels compiled", file=sys.stderr, flush=True)

    with FileLock(folder / "tests.lock"):
        failed = kernel_cache.prebuild(kernels, resolve(env.target_name()), progress=tell)
    # A device's schedule may refuse a geometry (shared memory); the test of that case says so.
    assert not failed or resolve(env.target_name()).emulated, "\n".join(failed)


@pytest.fixture(scope="session")
def device() -> str:
    """Torch device type of the target under test."""
    return resolve(env.target_name()).device
