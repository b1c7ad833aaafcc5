"""Packs and the cache of compiled kernels: what is written is whole, what does not fit is refused, first calls compile once."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
import torch
from filelock import FileLock

from tvm_gdn import build, cases, check, dispatch, kernel_cache, load, pack, parity
from tvm_gdn.errors import BuildError, PackError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve

SPEC = OPS["fused_recurrent_gated_delta_rule_update"]
CASE = {"B": 2, "T": 3, "H": 1, "HV": 2, "K": 8, "V": 16, "S": 3, "with": ("initial_state_source", "initial_state_indices")}
ROOT = Path(__file__).resolve().parent.parent
CALL = """
import sys, time, torch, tvm_gdn
from tvm_gdn import cases, dispatch, kernel_cache, parity
from tvm_gdn.ops import OPS
start = time.perf_counter()
result = parity.check_case(OPS[{op!r}], {case!r})
print(result.passed, "tvm" in sys.modules, result.served)
"""


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "small"
    geometry = check.geometry_of(SPEC, cases.draw(SPEC, CASE))
    kernel_cache.compile_pack(folder, [build.Request(SPEC, geometry)], resolve())
    return folder


def call(cache: Path, *, packs: Path | None = None, disable_jit: bool = False, op: str = SPEC.name, case=CASE, **environment):
    env = processes.environment(**{"TVM_GDN_CACHE_DIR": str(cache), "TVM_GDN_TARGET": "auto", **environment})
    if packs:
        env["TVM_GDN_PACK_PATH"] = str(packs)
    if disable_jit:
        env["TVM_GDN_DISABLE_JIT"] = "1"
    source = textwrap.dedent(CALL).format(op=op, case=case)
    return subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=300, check=False)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "pack")
    return tmp_path / "pack"


def edit(folder: Path, **changes) -> None:
    path = folder / pack.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_pack_serves_without_compiler(small_pack, tmp_path):
    done = call(tmp_path / "cache", packs=small_pack, disable_jit=True)
    assert done.stdout.split()[:2] == ["True", "False"], done.stderr
    assert "compiled (" in done.stdout
    assert not (tmp_path / "cache" / "kernels").exists()


def test_manifest_round_trips(small_pack):
    read = pack.read(small_pack)
    assert read.manifest.target == resolve().name
    assert read.manifest.target_digest == resolve().digest()
    (entry,) = read.manifest.kernels
    assert (entry.op, entry.geometry) == (SPEC.name, check.geometry_of(SPEC, cases.draw(SPEC, CASE)))
    assert (small_pack / entry.file).is_file()
    assert set(read.manifest.requires) == set(resolve().requires)
    assert pack.read_whole(small_pack) == read


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requires": ["avx512f", "amx_of_the_future"]}, "amx_of_the_future"),
        ({"format": 99}, "format is 99"),
        ({"machine": "aarch64"}, "machine is 'aarch64'"),
        ({"tvm_ffi": "0.2.0"}, "tvm_ffi ABI 0.2"),
        ({"image": "source"}, "image is 'source'"),
        ({"kernels": []}, "no kernels"),
        ({"kernels": None}, "damaged"),
    ],
)
def test_foreign_pack_is_refused_with_what_differs(small_pack, tmp_path, changes, words):
    folder = copy_of(small_pack, tmp_path)
    edit(folder, **changes)
    with pytest.raises(PackError, match=words.replace("(", r"\(")):
        pack.read(folder)


FIELDS = (
    "target", "target_digest", "rank", "device", "machine", "image", "arch", "serves", "driver", "requires", "tvm_ffi", "kernels",
)  # fmt: skip
KERNEL_FIELDS = ("op", "geometry", "symbol", "file", "sha256", "schedule", "knobs", "source")


@pytest.mark.parametrize("field", [*FIELDS, *(f"kernels[0].{name}" for name in KERNEL_FIELDS), "kernels[0].geometry.axes"])
@pytest.mark.parametrize("value", [..., None, 1.5, True, [None]])
def test_field_that_is_missing_or_of_another_type_is_named(small_pack, tmp_path, field, value):
    folder = copy_of(small_pack, tmp_path)
    manifest = json.loads((folder / pack.MANIFEST).read_text())
    table = manifest["kernels"][0] if field.startswith("kernels[0]") else manifest
    table = table["geometry"] if field.endswith(".axes") else table
    table.pop(field.rpartition(".")[2])
    if value is not ...:
        table[field.rpartition(".")[2]] = value
    (folder / pack.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(PackError) as error:
        pack.read(folder)
    assert f"{pack.MANIFEST} is damaged ({field}" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "/etc/passwd"),
        ("file", "../other/kernel.so"),
        ("file", ".."),
        ("file", ""),
        ("symbol", "../../kernel"),
        ("sha256", "0"),
        ("source", "0123"),
        ("geometry", {"axes": {"K": "8"}, "dtypes": {}, "attrs": {}}),
        ("geometry", {"axes": {}, "dtypes": {"q": 1}, "attrs": {}}),
        ("geometry", {"axes": {}, "dtypes": {}, "attrs": {"state_v_first": []}}),
    ],
)
def test_hostile_kernel_entry_is_refused(small_pack, tmp_path, field, value):
    folder = copy_of(small_pack, tmp_path)
    kernels = json.loads((folder / pack.MANIFEST).read_text())["kernels"]
    edit(folder, kernels=[{**kernels[0], field: value}])
    with pytest.raises(PackError, match=rf"damaged \(kernels\[0\]\.{field}.* must be "):
        pack.read(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": 2, "launcher": "x"}', "\udcff"])
def test_manifest_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / pack.MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(PackError, match="damaged"):
        pack.read(tmp_path)


def test_launcher_outside_the_pack_is_refused(small_pack, tmp_path):
    folder = copy_of(small_pack, tmp_path)
    edit(folder, launcher={"file": "/lib/launcher.so", "sha256": "0" * 64})
    with pytest.raises(PackError, match=r"launcher\.file must be a bare file name"):
        pack.read(folder)


def test_truncated_manifest_is_refused(small_pack, tmp_path):
    folder = copy_of(small_pack, tmp_path)
    path = folder / pack.MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(PackError, match="damaged"):
        pack.read(folder)


@pytest.mark.parametrize("how", ["tampered", "truncated", "missing"])
def test_changed_library_is_never_loaded(small_pack, tmp_path, how):
    folder = copy_of(small_pack, tmp_path)
    library = folder / pack.read(folder).manifest.kernels[0].file
    data = bytearray(library.read_bytes())
    if how == "missing":
        library.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        library.write_bytes(data if how == "tampered" else data[: len(data) // 2])
    done = call(tmp_path / "cache", packs=folder, disable_jit=True)
    assert done.returncode == 1
    assert library.name in done.stderr
    assert "PackError" in done.stderr


def damaged_copy(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    library = place / pack.read(place).manifest.kernels[0].file
    library.write_bytes(library.read_bytes()[:1000])
    return place


def test_damaged_library_leaves_the_next_pack_and_the_cache(small_pack, tmp_path, monkeypatch):
    damaged = damaged_copy(small_pack, tmp_path / "damaged")
    geometry = check.geometry_of(SPEC, cases.draw(SPEC, CASE))
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TVM_GDN_TARGET", "auto")
    monkeypatch.setenv("TVM_GDN_DISABLE_JIT", "1")
    cached = kernel_cache.folder_of(SPEC, geometry, resolve())
    for sound in (tmp_path / "sound", cached):
        monkeypatch.setenv("TVM_GDN_PACK_PATH", f"{damaged}{os.pathsep}{tmp_path / 'sound'}")
        dispatch.reset()
        with pytest.raises(PackError, match=r"Refused: pack .*damaged.*was changed or cut short"):
            dispatch.lookup(SPEC, geometry, "cpu")
        shutil.copytree(small_pack, sound)
        dispatch.reset()
        assert parity.check_case(SPEC, CASE).passed
        assert len(dispatch.usable_packs()[0]) == (2 if sound != cached else 1)
        assert dispatch.usable_packs()[1] == [], "one lookup's refusals are no other's"
        shutil.rmtree(sound)
    dispatch.reset()


def test_served_by_tells_geometries_apart(monkeypatch):
    spec, looked_up = OPS["fused_gdn_gating"], []
    single, half = ({"M": 3, "HV": 4, "dtype": dtype} for dtype in ("float32", "bfloat16"))
    real = dispatch._lookup

    def lookup(spec, geometry, device):
        looked_up.append(geometry)
        is_half = "bfloat16" in geometry.dtype.values()
        return dispatch.Served(None, "reference", "none", "a test") if is_half else real(spec, geometry, device)

    monkeypatch.setattr(dispatch, "_lookup", lookup)
    dispatch.reset()
    keys = [check.geometry_of(spec, cases.draw(spec, case)) for case in (single, half)]
    assert dispatch.served_by(spec.name) == dispatch.served_by(spec.name, keys[0]) == "not called yet"
    for case, passed in ((half, False), (single, True), (half, False), (single, True)):
        assert parity.check_case(spec, case).passed == passed
    assert looked_up == [keys[1], keys[0]]
    assert dispatch.served_by(spec.name).startswith("compiled")
    assert dispatch.served_by(spec.name, keys[1]) == "fallback (torch reference): a test"
    assert dispatch.served_by(spec.name, keys[0], "cuda") == "not called yet"
    dispatch.reset()


def test_lookups_wait_for_their_own_geometry_only(monkeypatch):
    spec, together = OPS["fused_gdn_gating"], threading.Barrier(2, timeout=20)
    geometries = [
        check.geometry_of(spec, cases.draw(spec, {"M": 3, "HV": 4, "dtype": dtype})) for dtype in ("float32", "float16")
    ]
    looked_up = []

    def lookup(spec, geometry, device):
        looked_up.append(geometry)
        together.wait()
        return dispatch.Served(None, "reference", "none", "a test")

    monkeypatch.setattr(dispatch, "_lookup", lookup)
    dispatch.reset()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda geometry: dispatch.lookup(spec, geometry, "cpu"), geometries * 2))
    assert len(looked_up) == 2 and set(looked_up) == set(geometries)
    dispatch.reset()


def test_batches_install_under_the_lock_of_first_calls(small_pack, tmp_path, monkeypatch):
    entry = pack.read(small_pack).manifest.kernels[0]
    kernel = pack.BuiltKernel(
        SPEC, entry.geometry, small_pack / entry.file, entry.symbol, entry.schedule, entry.knobs, entry.source
    )
    compiled = threading.Event()

    @contextlib.contextmanager
    def compile_nothing(*_):
        compiled.set()
        yield [kernel, kernel], small_pack / pack.read(small_pack).manifest.launcher.file

    monkeypatch.setattr(kernel_cache, "_compiled", compile_nothing)
    wanted = {tmp_path / name: build.Request(SPEC, entry.geometry) for name in ("first", "second")}
    with ThreadPoolExecutor(1) as pool:
        with FileLock(f"{tmp_path / 'first'}.lock"):
            running = pool.submit(kernel_cache.compile_each, wanted, resolve())
            assert compiled.wait(20)
            with pytest.raises(TimeoutError):
                running.result(timeout=0.5)
            assert not (tmp_path / "first").exists()
            shutil.copytree(small_pack, tmp_path / "first")
            before = (tmp_path / "first").stat().st_ino
        assert running.result(20) == {}
    assert (tmp_path / "first").stat().st_ino == before
    assert pack.read_whole(tmp_path / "second").manifest.kernels == (entry,)


def test_each_kernel_runs_on_the_launcher_of_its_pack(small_pack, tmp_path):
    pointers = []
    for name in ("same", "again", "other"):
        folder = tmp_path / name
        shutil.copytree(small_pack, folder)
        if name == "other":
            launcher = pack.read(folder).manifest.launcher.file
            data = (folder / launcher).read_bytes() + b"\0"
            (folder / launcher).write_bytes(data)
            edit(folder, launcher={"file": launcher, "sha256": hashlib.sha256(data).hexdigest()})
        read = pack.read(folder)
        load.load_kernel(read, read.manifest.kernels[0])
        library = ctypes.CDLL(str(folder / read.manifest.kernels[0].file))
        pointers.append(ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch").value)
    assert all(pointers)
    assert pointers[0] == pointers[1] != pointers[2]
    assert load.openmp_library()


def test_disabled_jit_names_the_missing_pack(tmp_path):
    done = call(tmp_path / "cache", disable_jit=True)
    assert done.returncode == 1
    for words in ("is in no pack", "TVM_GDN_DISABLE_JIT", f"tvm_gdn build --target {resolve().name} --op {SPEC.name}"):
        assert words in done.stderr


def test_other_sources_are_not_loaded(small_pack, tmp_path):
    folder = copy_of(small_pack, tmp_path)
    kernels = json.loads((folder / pack.MANIFEST).read_text())["kernels"]
    edit(folder, kernels=[{**kernels[0], "source": "0-0"}])
    done = call(tmp_path / "cache", packs=folder, disable_jit=True)
    assert done.returncode == 1
    assert "another version" in done.stderr


def test_two_first_calls_compile_once(tmp_path):
    cache = tmp_path / "cache"
    env = processes.environment(TVM_GDN_CACHE_DIR=str(cache), TVM_GDN_TARGET="auto")
    source = CALL.format(op="fused_gdn_gating", case={"M": 3, "HV": 4, "dtype": "bfloat16"})
    running = [
        subprocess.Popen([sys.executable, "-c", source], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert all(out.startswith("True False compiled") for out, _ in outputs), outputs
    assert sum("compiled fused_gdn_gating" in err for _, err in outputs) == 1
    assert len([p for p in (cache / "kernels").iterdir() if p.is_dir()]) == 1


def test_damaged_cache_entry_is_compiled_again(tmp_path):
    cache, case = tmp_path / "cache", {"M": 3, "HV": 4, "dtype": "float32"}
    assert call(cache, op="fused_gdn_gating", case=case).stdout.startswith("True")
    (library,) = (cache / "kernels").glob("*/fused_gdn_gating_*.so")
    library.write_bytes(library.read_bytes()[:1000])
    done = call(cache, op="fused_gdn_gating", case=case)
    assert done.stdout.startswith("True False compiled"), done.stderr
    assert "compiling it again" in done.stderr


def test_explicit_target_that_cannot_run_raises(tmp_path):
    done = call(tmp_path / "cache", TVM_GDN_TARGET="no-such-target")
    assert done.returncode == 1
    assert "no target 'no-such-target'; known: auto" in done.stderr


def test_targets_of_lower_rank_give_the_same_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path))
    for name in ("x86", "x86-avx2", "native"):
        if named(name).missing():
            continue
        monkeypatch.setenv("TVM_GDN_TARGET", name)
        dispatch.reset()
        result = parity.check_case(SPEC, {**CASE, "dtype": "bfloat16"})
        assert result.passed, result
        assert f"compiled ({name}" in result.served
    dispatch.reset()


def test_import_is_light():
    source = (
        "import torch, time; t = time.perf_counter(); import tvm_gdn, sys; print('tvm' in sys.modules, time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=True)
    imported, seconds = done.stdout.split()
    assert imported == "False"
    assert float(seconds) < 5  # the figure is in the benchmark; this only catches a compiler import


def test_kernel_survives_its_folder(small_pack, tmp_path, monkeypatch):
    folder = copy_of(small_pack, tmp_path)
    monkeypatch.setenv("TVM_GDN_PACK_PATH", str(folder))
    monkeypatch.setenv("TVM_GDN_TARGET", "auto")
    dispatch.reset()
    arguments = cases.draw(SPEC, CASE)
    parity.run(SPEC, arguments)
    shutil.rmtree(folder)
    want = parity.expected(SPEC, cases.draw(SPEC, CASE))
    got = parity.run(SPEC, cases.draw(SPEC, CASE))
    assert parity.rms_ratio(got["o"], want["o"]) < 1e-5
    assert torch.count_nonzero(got["o"])
    dispatch.reset()


def test_batches_hand_over_what_they_compiled(monkeypatch, tmp_path):
    """A batch that dies or takes too long loses no other batch's kernels, and is halved until the culprit stands alone."""
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path))
    spec = OPS["fused_gdn_gating"]
    cases_ = [
        {**case, "dtypes": {"A_log": a_log, "dt_bias": bias}} for case in spec.cases[:3] for a_log in DTYPES for bias in DTYPES
    ]
    wanted = [(spec, check.geometry_of(spec, cases.draw(spec, case))) for case in cases_]
    wanted = list({geometry.key: (spec, geometry) for spec, geometry in wanted}.values())
    culprit, seen = wanted[5][1].key, []

    def compile_each(share, target):
        seen.append(len(share))
        if any(request.geometry.key == culprit for request in share.values()):
            raise BuildError("took too long")
        return {}

    monkeypatch.setattr(kernel_cache, "compile_each", compile_each)
    failed = kernel_cache.prebuild(wanted, resolve(), jobs=1)
    assert len(wanted) > 16 and max(seen) == 16 and seen.count(1) >= 1
    assert len(failed) == 1 and "took too long" in failed[0]
    assert kernel_cache.prebuild([], resolve()) == []


DTYPES = ("float32", "bfloat16", "float16")
