"""Targets as data: what a file or a JSON object may state, and that no two of them pass for each other."""

import json
import shlex

import pytest
import torch

import tvm_gdn
from tvm_gdn import build, cases, check, dispatch, kernel_cache, pack, parity
from tvm_gdn import target as targets
from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.errors import PackError, TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve, target_names

GATING = OPS["fused_gdn_gating"]
CASE = {"M": 3, "HV": 4, "dtype": "float32"}
FIRST, SECOND = (
    json.dumps({"inherits": "x86", "description": "someone's", "codegen": {"kind": "llvm", "mcpu": mcpu}})
    for mcpu in ("nehalem", "x86-64")
)


def test_every_file_is_a_target():
    for name in target_names():
        spec = named(name)
        assert (spec.name, spec.lineage[0], spec.text) == (name, name, name)
        found = resolve(name)  # a family's name, such as cuda, stands for its member that is present
        assert name in found.lineage
        hash(found)


def test_targets_share_no_kernel_of_the_cache():
    """Two of them compile for one CPU, with schedules of their own: the matrix unit's emulation and AVX2."""
    spec = OPS["fused_experts_quantized"]
    geometry = geometry_of_case(spec, spec.cases[0])
    keys = {name: kernel_cache.kernel_key(spec, geometry, named(name)) for name in target_names()}
    assert named("x86-amx-emulated").digest() == named("x86-avx2").digest()
    assert len(set(keys.values())) == len(keys)


def test_json_targets_are_named_after_what_they_generate():
    first, second = resolve(FIRST), resolve(SECOND)
    assert first.name == f"custom-{first.digest()[:8]}" != second.name
    assert first.lineage == (first.name, "x86")
    assert resolve(first.text) == first
    assert first.requires == named("x86").requires


def test_lists_become_tuples():
    spec = resolve(json.dumps({"inherits": "x86", "codegen": {"kind": "llvm", "mattr": ["+avx2", "+fma"]}}))
    assert dict(spec.codegen)["mattr"] == ("+avx2", "+fma")
    hash(spec)
    assert resolve(spec.text) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requires", "avx2"),
        ("requires", [1]),
        ("requires", {"avx2": 1}),
        ("lacks", "float16"),
        ("rank", "high"),
        ("rank", True),
        ("rank", 1.5),
        ("device", 1),
        ("device", ""),
        ("description", ["text"]),
        ("inherits", "x87"),
        ("inherits", None),
        ("codegen", "llvm"),
        ("codegen", {"kind": None}),
        ("codegen", {"kind": "llvm", "host": {"kind": "llvm"}}),
        ("pass_config", [1]),
        ("pass_config", {"tirx.disable_storage_rewrite": [[True]]}),
        ("mcpu", "haswell"),
    ],
)
def test_wrong_field_is_named(field, value):
    text = json.dumps({"inherits": "x86", field: value})
    with pytest.raises(TargetError, match=field):
        resolve(text)


@pytest.mark.parametrize("text", ["{", "{}", '{"device": "cpu"}', '{"a":' * 100_000])
def test_incomplete_json_is_a_target_error(text):
    with pytest.raises(TargetError):
        resolve(text)


def test_pack_serves_the_explicit_target_that_it_was_built_for_alone(tmp_path, monkeypatch):
    geometry = check.geometry_of(GATING, cases.draw(GATING, CASE))
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TVM_GDN_PACK_PATH", str(tmp_path / "pack"))
    monkeypatch.setenv("TVM_GDN_DISABLE_JIT", "1")
    kernel_cache.compile_pack(tmp_path / "pack", [build.Request(GATING, geometry)], resolve(FIRST))

    monkeypatch.setenv("TVM_GDN_TARGET", SECOND)
    dispatch.reset()
    with pytest.raises(PackError) as error:
        dispatch.lookup(GATING, geometry, "cpu")
    command = shlex.split(str(error.value).split("Build it with: ")[1])
    assert resolve(command[command.index("--target") + 1]) == resolve(SECOND)
    assert command[command.index("--geometry") + 1] == geometry.key

    monkeypatch.setenv("TVM_GDN_TARGET", FIRST)
    dispatch.reset()
    result = parity.check_case(GATING, CASE)
    assert result.passed, result
    assert resolve(FIRST).name in result.served

    path = tmp_path / "pack" / pack.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_digest": "0"}))
    dispatch.reset()
    with pytest.raises(PackError, match="was built for another custom-"):
        dispatch.lookup(GATING, geometry, "cpu")
    dispatch.reset()


def test_a_forced_target_that_the_cpu_lacks_is_an_error(monkeypatch):
    """Never an illegal instruction, and never quietly another kernel: on a CPU without AMX and AVX-512, named explicitly."""
    plain = frozenset(flag for flag in targets.host_features() if not flag.startswith(("amx", "avx512")))
    monkeypatch.setattr(targets, "host_features", lambda: plain)
    x, w13, w2 = torch.randn(2, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    for name, flag in (("x86-amx", "amx_tile"), ("x86-avx512", "avx512f")):
        monkeypatch.setenv("TVM_GDN_TARGET", name)
        dispatch.reset()
        with pytest.raises(
            TargetError, match=rf"target {name} needs CPU features that .* lacks: .*{flag}.*; use `auto` or one of: "
        ):
            tvm_gdn.fused_experts(x, w13, w2, torch.rand(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    monkeypatch.undo()
    dispatch.reset()
