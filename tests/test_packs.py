"""Packs and the cache of compiled kernels: what is written is whole, what does not fit is refused, first calls compile once."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tvm_gdn import build, cases, check, dispatch, pack, parity
from tvm_gdn.errors import PackError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve

SPEC = OPS["fused_recurrent_gated_delta_rule_update"]
CASE = {"B": 2, "T": 3, "H": 1, "HV": 2, "K": 8, "V": 16, "S": 3, "with": ("initial_state_source", "initial_state_indices")}
ROOT = Path(__file__).resolve().parent.parent
CALL = """
import sys, time, torch, tvm_gdn
from tvm_gdn import cases, dispatch, parity
from tvm_gdn.ops import OPS
start = time.perf_counter()
result = parity.check_case(OPS[{op!r}], {case!r})
print(result.passed, "tvm" in sys.modules, result.served)
"""


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "small"
    geometry = check.geometry_of(SPEC, cases.draw(SPEC, CASE))
    dispatch.compile_pack(folder, [build.Request(SPEC, geometry)], resolve())
    return folder


def call(cache: Path, *, packs: Path | None = None, disable_jit: bool = False, op: str = SPEC.name, case=CASE, **environment):
    env = {**os.environ, "TVM_GDN_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "TVM_GDN_TARGET": "auto", **environment}
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
    assert read.target == resolve().name
    assert [entry["op"] for entry in read.manifest["kernels"]] == [SPEC.name]
    entry = read.manifest["kernels"][0]
    assert (small_pack / entry["file"]).is_file()
    assert set(read.manifest["requires"]) == set(resolve().requires)


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


def test_truncated_manifest_is_refused(small_pack, tmp_path):
    folder = copy_of(small_pack, tmp_path)
    path = folder / pack.MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(PackError, match="damaged"):
        pack.read(folder)


@pytest.mark.parametrize("how", ["tampered", "truncated", "missing"])
def test_changed_library_is_never_loaded(small_pack, tmp_path, how):
    folder = copy_of(small_pack, tmp_path)
    library = folder / pack.read(folder).manifest["kernels"][0]["file"]
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
    env = {**os.environ, "TVM_GDN_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "TVM_GDN_TARGET": "auto"}
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
    source = "import torch, time; t = time.perf_counter(); import tvm_gdn, sys; print('tvm' in sys.modules, time.perf_counter() - t)"
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
