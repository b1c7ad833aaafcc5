"""The command `tvm_gdn export`: what it says, refuses, and never writes."""

from __future__ import annotations

import sys

import pytest
from exports import CHUNK, LAYER, request, run

from tvm_gdn.export import c_files, onnx_files, onnx_parts, onnx_run
from tvm_gdn.export.artifact import all_passed
from tvm_gdn.export.command import export

ONNX_WORDS = ("--op", CHUNK, "--format", "onnx", "--dims", "K=32,V=16,dtype=float32,H=2,HV=4")


def test_command_writes_one_file_and_says_who_verified_it(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "rule.onnx"
    assert run(*ONNX_WORDS, "-o", path) == 0
    text = capsys.readouterr().out
    assert path.is_file() and [p.name for p in tmp_path.iterdir()] == ["rule.onnx"]
    for who in ("onnx.checker", "onnx.reference", "onnxruntime", "limit 1e-05"):
        assert who in text
    assert run(*ONNX_WORDS, "-o", path) == 2
    assert "--force" in capsys.readouterr().err
    assert run(*ONNX_WORDS, "--profile", "decomposed", "--force", "-o", path) == 0


@pytest.mark.parametrize("form", ["onnx", "c"])
def test_failed_verification_writes_nothing(form, tmp_path, capsys, monkeypatch):
    """An exporter whose q is scaled wrongly by one part in a thousand."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        honest = onnx_parts.l2norm
        monkeypatch.setattr(onnx_parts, "l2norm", lambda graph, x: graph.Mul(honest(graph, x), graph.constant(1.001)))
    else:
        honest = c_files._entry
        monkeypatch.setattr(c_files, "_entry", lambda interface: honest(interface).replace("= scale;", "= scale * 1.001f;"))
    path = tmp_path / "out"
    # The smallest kernel that scales q.
    words = (
        "--op",
        "fused_recurrent_gated_delta_rule",
        "--format",
        form,
        "--dims",
        "K=16,V=8,dtype=float32,H=2,HV=4",
        "-o",
        path,
    )
    assert run(*words) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "nothing was written" in text and not list(tmp_path.iterdir())
    assert run(*words, "--no-verify") == 0
    assert "not verified" in capsys.readouterr().out and path.is_dir()


def test_no_verifier_is_no_success(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    missing = lambda *args: (_ for _ in ()).throw(ImportError("not installed"))  # noqa: E731
    monkeypatch.setattr(onnx_run, "run_reference", missing)
    monkeypatch.setattr(onnx_run, "run_onnxruntime", missing)
    monkeypatch.setattr(onnx_run, "checked", lambda path: onnx_files.Check("model", "nobody", None))
    checks, _ = export(request(CHUNK, "K=32,V=16,dtype=float32", profile="standard"), "onnx", tmp_path / "x.onnx")
    assert not all_passed(checks) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "onnx"), "--op"),
        (("--op", CHUNK, "--format", "onnx", "--profile", "old", "--dims", "K=32,V=32"), "standard, decomposed, chunked, ort"),
        (("--op", CHUNK, "--format", "c", "--profile", "ort", "--dims", "K=32,V=32"), "has none"),
        (("--op", CHUNK, "--format", "onnx", "--dims", "K=32,V=32,H=0"), "at least 1"),
        (("--op", CHUNK, "--format", "onnx", "--dims", "K=32,V=32,H=2,HV=3"), "multiple of H"),
        (("--op", CHUNK, "--format", "onnx", "--dims", "K=32,V=32", "--chunk", "0"), "--chunk"),
        (("--op", "fused_recurrent_kda", "--format", "onnx", "--model", "qwen3-next"), "does not call"),
        (("--op", "expert_stats", "--format", "onnx", "--dims", "with="), "onnx has: fused_gdn_gating, "),
        (("--op", "chunk_kda", "--format", "c", "--dims", "K=32,V=32,dtype=float16"), "chunk_kda has: onnx (--profile standard,"),
        (("--op", "chunk_kda", "--format", "c", "--dims", "K=32,V=32,dtype=float16"), "c: float32, bfloat16; torch: float32"),
        (("--op", LAYER.name, "--format", "c", "--dims", "K=32,V=32,W=4"), "c has no gated_delta_net; gated_delta_net has: onnx"),
        (("--op", "moe_sort", "--format", "onnx", "--dims", "with="), "moe_sort has: c: float32"),
        (("--op", "fused_experts", "--format", "onnx", "--profile", "chunked", "--dims", "D=8,I=8"), "allowed: dense, loop, ort"),
        (("--op", "fused_experts_packed", "--format", "onnx"), "give --weights PACK"),
        (("--op", CHUNK, "--format", "onnx"), "--model (one of: qwen3-next"),
    ],
)
def test_refused_requests_name_what_is_allowed(words, message, tmp_path, capsys):
    assert run(*words, "-o", tmp_path / "x") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(*ONNX_WORDS, "-o", tmp_path / "x.onnx") == 2
    assert capsys.readouterr().err.endswith("error: --format onnx needs onnx: pip install 'tvm_gdn[export]'\n")
    assert not list(tmp_path.iterdir())


def test_force_leaves_other_files_alone(tmp_path, capsys):
    pytest.importorskip("onnx")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious").write_text("x")
    assert run(*ONNX_WORDS, "-o", folder) == 2
    assert run(*ONNX_WORDS, "--force", "--no-verify", "-o", folder) == 0
    assert sorted(p.name for p in folder.iterdir()) == [f"{CHUNK}.onnx", "precious"]
