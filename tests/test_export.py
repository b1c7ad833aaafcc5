"""Exports: each is compiled or evaluated by programs that know nothing of tvm_gdn, and held against the float64 reference."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess

import pytest
import torch
from compilers import needs_cxx

import tvm_gdn
from tvm_gdn import cli, dispatch, parity, reference, reference_moe, schedule, target
from tvm_gdn.commands import arguments
from tvm_gdn.errors import ArgumentError
from tvm_gdn.export import c_files, gpu_source, onnx_files, onnx_layer, onnx_moe, onnx_parts, onnx_run, torch_program
from tvm_gdn.export.artifact import ExportError, Request, all_passed, draw, fill
from tvm_gdn.export.command import export
from tvm_gdn.ops import OPS

CHUNK = "chunk_gated_delta_rule"
UPDATE = "fused_recurrent_gated_delta_rule_update"
FUSED = "fused_conv_gated_delta_rule_update"
HEADS = (("H", 2), ("HV", 4))


LAYER = onnx_layer.SPEC


def request(op, dims="", **options):
    spec = LAYER if op == LAYER.name else OPS[op]
    return Request(spec, arguments.parse_dims(spec, dims), **options)


def run(*words):
    return cli.main(["export", *map(str, words)])


# --- C


CONV = ("conv_states", "has_initial_state", "query_start_loc", "cache_indices", "bias")
C_KERNELS = [
    ("fused_gdn_gating", "dtype=bfloat16"),
    ("moe_route", ""),
    (CHUNK, "K=32,V=16,dtype=float32,state_v_first=1"),
    ("chunk_kda", "K=16,V=32,dtype=bfloat16,with=initial_state+cu_seqlens"),
    ("packed_decode_gated_delta_rule", "K=32,V=16,dtype=float32,state=bfloat16"),
    ("causal_conv1d_fn", f"W=4,L=3,dtype=float32,state=float32,with={'+'.join(CONV)}"),
    ("rms_norm_gated", "D=33,dtype=bfloat16,norm_before_gate=0,activation=sigmoid"),
    ("fused_experts", "D=51,I=65,dtype=float32"),  # more weights than a self-test carries
]
C_MORE = [
    ("causal_conv1d_update", "W=4,L=5,dtype=bfloat16,state=bfloat16,activation=silu,with=conv_state_indices"),
    ("moe_sort", ""),
    ("expert_stats", ""),
    ("fused_experts_packed", "D=20,G=4,KD=1,ND=1,KI=2,dtype=float32,scheme=bf16"),
    ("fused_experts_quantized", "D=60,G=4,KD=1,ND=2,KI=1,S13=1,S2=1,dtype=float32,scheme=int8"),
    ("fused_experts_quantized", "D=60,G=8,KD=1,ND=2,KI=1,S13=4,S2=4,scheme=int4_kgroup,w13_scale=bfloat16,w2_scale=bfloat16"),
]
C_TREE = (
    "fused_recurrent_gated_delta_rule_update",
    "K=16,V=16,with=initial_state_source+initial_state_indices+cu_seqlens+intermediate_states_buffer+retrieve_parent_token",
)


@pytest.mark.parametrize(
    ("op", "dims"), [*C_KERNELS, *(pytest.param(*kernel, marks=pytest.mark.slow) for kernel in (*C_MORE, C_TREE))]
)
def test_c_compiles_without_warnings_and_its_self_test_passes(op, dims, tmp_path):
    wanted = request(op, dims)
    files = c_files.build(wanted)
    assert b"tvm/" not in files[f"{wanted.symbol}.c"]
    fill(tmp_path, files)
    *checks, cmake = c_files.verify(wanted, tmp_path)
    assert checks and all(check.passed for check in checks), checks
    assert cmake.passed is (None if shutil.which("cmake") is None else True) and cmake.by == "cmake", cmake
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    # The self-test itself must notice a wrong result.
    source = (tmp_path / f"{wanted.symbol}.c").read_text()
    # clang warns of functions that nobody calls, even of inline ones.
    assert all(source.count(f"{name}(") > 1 for name in re.findall(r"^static [\w ]+[ *](\w+)\(", source, flags=re.MULTILINE))
    spoiled = source.replace("return (int)kernel(args", "args[0].type_index = 7; return 0; (void)kernel; (void)(args")
    assert spoiled != source
    (tmp_path / f"{wanted.symbol}.c").write_text(spoiled)
    assert not any(check.passed for check in c_files.verify(wanted, tmp_path))


@pytest.mark.parametrize("op", ["fused_recurrent_gated_delta_rule", "fused_experts"])
def test_target_c_serves_calls_in_this_process(op, monkeypatch):
    """The kernels that are exported are those of a target like any other: parity runs on them."""
    monkeypatch.setenv("TVM_GDN_TARGET", "c")
    dispatch.reset()
    try:
        result = parity.check_case(OPS[op], OPS[op].cases[0])
    finally:
        monkeypatch.undo()
        dispatch.reset()
    assert result.passed and result.served == "compiled (c, generic)", result


def test_c_library_called_by_a_program_that_is_not_ours(tmp_path):
    """Built as a shared library and called through ctypes: other sizes than the self-test's, and a refused call."""
    wanted = request(CHUNK, "K=32,V=16,dtype=float32")
    fill(tmp_path, c_files.build(wanted))
    library = tmp_path / "lib.so"
    subprocess.run(
        ["cc", "-std=c99", "-O1", "-shared", "-fPIC", tmp_path / f"{wanted.symbol}.c", "-o", library, "-lm"], check=True
    )
    function, error = (getattr(ctypes.CDLL(str(library)), wanted.symbol + end) for end in ("", "_error"))
    error.restype = ctypes.c_char_p
    values, want = draw(wanted, seed=3, B=3, T=65, H=2, HV=4)
    tensors = [values[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
    o, final = torch.full((3, 65, 4, 16), float("nan")), torch.full((3, 4, 32, 16), float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]

    def call(heads, scale=32**-0.5):
        tail = [ctypes.c_void_p(o.data_ptr()), ctypes.c_void_p(final.data_ptr())]
        sizes = [ctypes.c_int64(n) for n in (3, 65, heads, 4, 3)]
        # Tensors and scalars in the operator's order, outputs, then B, T, H, HV, N.
        return function(*pointers[:5], ctypes.c_float(scale), pointers[5], ctypes.c_int(1), *tail, *sizes)

    assert f"int64_t {'HV'}" in (tmp_path / f"{wanted.symbol}.h").read_text()
    assert call(2) == 0, error()
    for name, got in (("o", o), ("final_state", final)):
        assert parity.rms_ratio(got, want[name]) < 1e-5
    assert call(3) == -1
    assert b"HV" in error() or b"head" in error()


def test_c_has_no_float16():
    with pytest.raises(ExportError, match=r"float16.*allowed: float32, bfloat16"):
        c_files.build(request(CHUNK, "K=32,V=16,dtype=float16"))


# --- ONNX

PROFILES = onnx_files.profiles("chunk")
MODELS = [
    *((CHUNK, "K=32,V=16,dtype=float32", {"profile": profile, "chunk": 16}) for profile in PROFILES),
    ("chunk_kda", "K=16,V=32,dtype=float32", {"profile": "standard"}),
    ("chunk_kda", "K=16,V=32,dtype=float32", {"profile": "chunked", "chunk": 16}),
    ("chunk_kda", "K=16,V=32,dtype=float32", {"profile": "decomposed"}),
    ("fused_recurrent_delta_rule", "K=32,V=16,dtype=float16,with=", {"profile": "standard"}),
    ("chunk_delta_rule", "K=32,V=16,dtype=float32,with=", {"profile": "chunked", "chunk": 24}),
    (CHUNK, "K=32,V=16,dtype=bfloat16,state_v_first=1", {"profile": "chunked", "chunk": 16, "tokens": 37}),
    (CHUNK, "K=32,V=16,dtype=bfloat16,state=bfloat16", {"profile": "standard", "l2norm": False, "scale": 0.5}),
    ("fused_gdn_gating", "dtype=bfloat16", {"profile": "standard"}),
    ("rms_norm_gated", "D=20,dtype=float32", {"profile": "standard"}),
    ("rms_norm_gated", "D=20,dtype=bfloat16,norm_before_gate=0", {"profile": "decomposed"}),
    *((op, dims, {"profile": profile, "heads": (("D", 12),)})
      for profile in ("standard", "decomposed", "ort")
      for op, dims in (
          ("causal_conv1d_fn", "W=4,L=3,dtype=float32,state=float32,with=conv_states+has_initial_state+bias"),
          ("causal_conv1d_fn", "W=3,L=2,dtype=bfloat16,state=bfloat16,with=,activation=None"),
          ("causal_conv1d_update", "W=4,L=5,dtype=float32,state=float32,with=,activation=silu"))),
    *((op, dims, {"profile": profile, "chunk": 16})
      for profile, op, dims in (
          ("standard", UPDATE, "K=32,V=16,dtype=bfloat16,state=bfloat16,state_v_first=1,initial_state_indices=int32"),
          ("decomposed", UPDATE, "K=32,V=16,dtype=float32,with=initial_state_source"),
          ("ort", "fused_sigmoid_gating_delta_rule_update", "K=16,V=32,dtype=float32"),
          ("chunked", f"{CHUNK}_update", "K=32,V=16,dtype=float32,state_v_first=1"),
          ("standard", "chunk_kda_update", "K=16,V=32,dtype=float32"),
          ("decomposed", "fused_recurrent_delta_rule_update", "K=16,V=32,dtype=bfloat16,state=float16"),
          ("standard", "packed_decode_gated_delta_rule", "K=32,V=16,dtype=float32,state_v_first=1"),
          ("standard", FUSED, "K=32,V=16,W=4,L=3,dtype=float32,state=float32"),
          ("decomposed", FUSED, "K=16,V=32,W=3,L=5,dtype=bfloat16,state=float32,with=conv_bias+conv_state_indices,activation=None"),
          ("ort", FUSED, "K=16,V=32,W=4,L=3,dtype=float32,state=float32,with=initial_state_indices"))),
    *(("causal_conv1d_fn", "W=4,L=3,dtype=float32,state=float32,with=conv_states+cache_indices+has_initial_state",
       {"profile": profile, "heads": (("D", 12),)}) for profile in ("standard", "decomposed")),
    ("causal_conv1d_update", "W=4,L=5,dtype=bfloat16,state=bfloat16,activation=silu", {"profile": "ort", "heads": (("D", 12),)}),
    *((LAYER.name, "K=32,V=16,W=4,dtype=float32", {"profile": profile, "chunk": 16}) for profile in PROFILES),
    (LAYER.name, "K=16,V=32,W=4,dtype=bfloat16", {"profile": "standard"}),
    ("moe_route", "E=37,dtype=bfloat16", {"profile": "standard", "heads": (("k", 5),), "renormalize": False}),
    ("moe_route", "E=64,dtype=float32,scoring=sigmoid,num_expert_group=8,topk_group=4,with=correction_bias",
     {"profile": "decomposed", "heads": (("k", 5),), "scale": 2.5}),
    *(("fused_experts", "D=51,I=33,dtype=float32", {"profile": profile, "heads": (("E", 7), ("k", 3))})
      for profile in ("dense", "loop", "ort")),
    ("fused_experts", "D=32,I=40,dtype=bfloat16,topk_ids=int32", {"profile": "loop", "heads": (("E", 5), ("k", 2))}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "dims", "options"), MODELS)
def test_onnx(op, dims, options, tmp_path):
    pytest.importorskip("onnx")
    wanted = request(op, dims, **{"heads": HEADS, **options})
    fill(tmp_path, onnx_files.build(wanted))
    checks = onnx_files.verify(wanted, tmp_path)
    assert all_passed(checks), "\n".join(map(str, checks))
    evaluators = {check.by.split()[0] for check in checks if check.passed and check.what.startswith("numbers")}
    pytest.importorskip("onnxruntime")
    fused = any("com.microsoft" in check.detail for check in checks)
    assert fused == (options["profile"] == "ort")
    assert evaluators == ({"onnxruntime"} if fused else {"onnxruntime", "onnx.reference"})


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4_kgroup", "bf16"])
def test_packed_experts_as_onnxruntimes_own_operators(scheme, tmp_path, capsys):
    """Weights of a pack file, laid out anew without a change of numbers; activations stay as they are."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pack = tvm_gdn.pack_experts(torch.randn(5, 2 * 96, 160) / 12, torch.randn(5, 160, 96) / 10, scheme, progress=False)
    pack.save(tmp_path / "pack.safetensors")
    op = "fused_experts_packed" if scheme == "bf16" else "fused_experts_quantized"
    path = tmp_path / "experts.onnx"
    words = ("--op", op, "--format", "onnx", "--weights", tmp_path / "pack.safetensors", "--dims", "k=3,dtype=float32")
    assert run(*words, "--profile", "ort", "-o", path) == 0
    assert "limit 1e-05" in capsys.readouterr().out
    (node,) = [node for node in onnx.load(path).graph.node if node.domain == "com.microsoft"]
    assert node.op_type == ("MoE" if scheme == "bf16" else "QMoE")
    if scheme != "bf16":
        assert path.stat().st_size < 3 * 5 * 96 * 160 * (1.2 if scheme == "int8" else 0.75)
        # Our own kernel's activations are rounded to int8, so it differs from QMoE by that and no more.
        x, weights = torch.randn(9, 160), torch.rand(9, 3)
        ids = torch.rand(9, 5).argsort(-1)[:, :3]
        (got,) = onnx_run.run_onnxruntime(path, {"x": x, "topk_weights": weights, "topk_ids": ids}, None)
        ours = reference.fused_experts(x, *pack.unpack(), weights, ids, rows=reference_moe._in_127ths)
        assert 1e-4 < parity.rms_ratio(got, ours) < 2e-2
    assert run(*words, "--profile", "loop", "-o", tmp_path / "loop.onnx") == 0


def test_qmoe_weights_are_the_packs(tmp_path):
    pack = tvm_gdn.pack_experts(torch.randn(3, 2 * 40, 64), torch.randn(3, 64, 40), "int4", progress=False)
    laid, (w13, w2) = onnx_moe.qmoe_weights(pack), pack.unpack()
    for name, want, rows in (("fc1", w13.view(3, 2, 40, 64).transpose(1, 2).reshape(3, 80, 64), 80), ("fc2", w2, 64)):
        packed, scale = (torch.from_numpy(laid[f"{name}_{end}"]) for end in ("experts_weights", "scales"))
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).float()
        assert codes.shape[1] == rows and torch.equal((codes - 8) * scale[..., None], want)
    with pytest.raises(ExportError, match="allowed: int8, int4, int4_kgroup"):
        onnx_moe.qmoe_weights(tvm_gdn.pack_experts(torch.randn(1, 4, 4), torch.randn(1, 4, 2), "bf16", progress=False))
    odd = tvm_gdn.pack_experts(torch.randn(1, 80, 48), torch.randn(1, 48, 40), "int4_kgroup", progress=False)
    with pytest.raises(ExportError, match="D = 48; allowed with int4_kgroup: multiples of 32"):
        onnx_moe.qmoe_weights(odd)


def test_layer_split_in_time_is_the_whole(tmp_path):
    """States come out as they go in: 40 tokens, or 17 and then 23."""
    pytest.importorskip("onnxruntime")
    wanted = request(LAYER.name, "K=32,V=16,W=4,dtype=float32", profile="standard", heads=HEADS)
    fill(tmp_path, onnx_files.build(wanted))
    path, (feeds, want) = tmp_path / f"{LAYER.name}.onnx", onnx_layer.draw(wanted, 40)
    states, outputs = {name: feeds[name] for name in ("conv_state", "state")}, []
    for piece in (slice(0, 17), slice(17, 40)):
        part = {name: feeds[name][:, piece] for name in ("mixed_qkv", "z", "a", "b")}
        o, *after = onnx_run.run_onnxruntime(path, {**feeds, **part, **states}, ["o", "next_conv_state", "next_state"])
        states = dict(zip(states, after, strict=True))
        outputs.append(o)
    assert parity.rms_ratio(torch.cat(outputs, 1), want["o"]) < 1e-5
    assert all(parity.rms_ratio(states[name], want[name]) < 1e-5 for name in states)


def test_onnx_pool_rows_that_no_sequence_owns_stay(tmp_path):
    """Bit for bit, and padding writes nothing: decode of 3 of 6 slots, two steps, against the operator itself."""
    pytest.importorskip("onnxruntime")
    wanted = request(UPDATE, "K=32,V=16,dtype=float32", profile="standard", heads=HEADS)
    fill(tmp_path, onnx_files.build(wanted))
    pool, ids = torch.randn(6, 4, 32, 16), torch.tensor([4, -1, 1])
    theirs = pool.clone()
    for seed in range(2):
        feeds, _ = draw(wanted, seed, B=3, T=1, S=6, H=2, HV=4)
        given = {name: feeds[name] for name in ("q", "k", "v", "g", "beta")}
        o, after = onnx_run.run_onnxruntime(
            tmp_path / f"{UPDATE}.onnx", {**given, "initial_state_source": pool, "initial_state_indices": ids},
            ["o", "next_initial_state_source"],
        )  # fmt: skip
        want = reference.fused_recurrent_gated_delta_rule_update(
            **given, initial_state_source=theirs, initial_state_indices=ids, use_qk_l2norm_in_kernel=True
        )
        assert torch.equal(after[[0, 2, 3, 5]], pool[[0, 2, 3, 5]]) and not torch.equal(after[[1, 4]], pool[[1, 4]])
        assert parity.rms_ratio(o, want) < 1e-5 and parity.rms_ratio(after, theirs) < 1e-5
        pool = after


@pytest.mark.parametrize("tokens", [0, 130])
def test_onnx_chunks_of_one_repeated_key(tokens, tmp_path):
    """Equal keys, beta 1, no decay: powers of the chunk's matrix reach 1e18, its inverse stays small."""
    pytest.importorskip("onnxruntime")
    wanted = request(CHUNK, "K=32,V=16,dtype=float32", profile="chunked", heads=HEADS, tokens=tokens)
    fill(tmp_path, onnx_files.build(wanted))
    q, v = torch.randn(1, 130, 2, 32), torch.randn(1, 130, 4, 16)
    k = torch.randn(1, 1, 2, 32).expand(1, 130, 2, 32).contiguous()
    g, beta, state = torch.zeros(1, 130, 4), torch.ones(1, 130, 4), torch.randn(1, 4, 32, 16)
    path = tmp_path / f"{CHUNK}.onnx"
    feeds = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}
    o, final = onnx_run.run_onnxruntime(path, feeds, ["o", "final_state"])
    want, last = reference.chunk_gated_delta_rule(q, k, v, g, beta, None, state, True, use_qk_l2norm_in_kernel=True, exact=True)
    assert parity.rms_ratio(o, want) < 1e-5 and parity.rms_ratio(final, last) < 1e-5


def test_onnx_profiles_use_what_they_say():
    onnx = pytest.importorskip("onnx")
    seen = {}
    for profile in PROFILES:
        model = onnx.load_from_string(
            onnx_files.build(request(CHUNK, "K=32,V=16,dtype=float32", profile=profile, heads=HEADS))[f"{CHUNK}.onnx"]
        )
        seen[profile] = {(node.domain, node.op_type) for node in model.graph.node}
        assert {o.domain: o.version for o in model.opset_import}[""] == onnx_parts.OPSET[profile]
        shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert shape == ["batch", "time", 2, 32]
        assert [o.name for o in model.graph.output] == ["o", "final_state"]
    assert ("", "LinearAttention") in seen["standard"] and ("com.microsoft", "LinearAttention") in seen["ort"]
    assert all(op != "LinearAttention" for profile in ("decomposed", "chunked") for _, op in seen[profile])
    fixed = request(CHUNK, "K=32,V=16,dtype=float32", profile="chunked", heads=HEADS, tokens=96)
    model = onnx.load_from_string(onnx_files.build(fixed)[f"{CHUNK}.onnx"])
    assert not {"Scan", "Loop", "If"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    ("op", "dims", "message"),
    [
        (CHUNK, "K=32,V=32,with=cu_seqlens", "cu_seqlens has no ONNX form; allowed: sequences of one length"),
        (C_TREE[0], C_TREE[1], "cu_seqlens has no ONNX form"),
        ("causal_conv1d_fn", f"W=4,L=3,with={'+'.join(CONV)}", "query_start_loc has no ONNX form"),
    ],
)
def test_onnx_refuses_what_it_cannot_say(op, dims, message):
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match=message):
        onnx_files.build(request(op, dims, profile="standard"))


# --- the command

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
    assert run("--op", CHUNK, "--format", form, "--dims", "K=32,V=16,dtype=float32,H=2,HV=4", "-o", path) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "nothing was written" in text and not list(tmp_path.iterdir())
    assert run("--op", CHUNK, "--format", form, "--dims", "K=32,V=16,dtype=float32,H=2,HV=4", "-o", path, "--no-verify") == 0
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


def test_force_leaves_other_files_alone(tmp_path, capsys):
    pytest.importorskip("onnx")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious").write_text("x")
    assert run(*ONNX_WORDS, "-o", folder) == 2
    assert run(*ONNX_WORDS, "--force", "--no-verify", "-o", folder) == 0
    assert sorted(p.name for p in folder.iterdir()) == [f"{CHUNK}.onnx", "precious"]


# --- torch, and torch to ONNX


def test_torch_program(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("--op", CHUNK, "--format", "torch", "--dims", "K=32,V=16,dtype=float32", "-o", tmp_path / "x.pt2") == 0
    text = capsys.readouterr().out
    assert "one node" in text and text.count(" ok ") == 3 and (tmp_path / "x.pt2").is_file()


def test_a_model_goes_to_onnx_with_its_operators_as_linear_attention(tmp_path):
    """Both profiles, symbolic batch and time, bf16-free; the numbers are those of the model in torch."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(24, 2 * 2 * 32 + 4 * 16 + 8)

        def forward(self, x, state):
            q, k, v, g, beta = self.inner(x).split([64, 64, 64, 4, 4], -1)
            o, last = tvm_gdn.chunk_gated_delta_rule(
                q.unflatten(-1, (2, 32)), k.unflatten(-1, (2, 32)), v.unflatten(-1, (4, 16)), -g.exp(), beta.sigmoid(),
                initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            return o.flatten(2), last

    model = Layer().eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    example = (torch.randn(2, 6, 24), torch.randn(2, 4, 32, 16))
    program = torch.export.export(model, example, dynamic_shapes=(dims, {0: dims[0]}))
    x, state = torch.randn(3, 19, 24), torch.randn(3, 4, 32, 16)
    for profile, domain in (("ort", "com.microsoft"), ("standard", "")):
        path = tmp_path / f"{profile}.onnx"
        torch_program.to_onnx(program, profile).save(str(path))
        onnx.checker.check_model(str(path), full_check=True)
        nodes = {(node.domain, node.op_type) for node in onnx.load(str(path)).graph.node}
        assert (domain, "LinearAttention") in nodes
        got = onnx_run.run_onnxruntime(path, {"x": x, "state": state}, None)
        for value, want in zip(got, model(x, state), strict=True):
            assert parity.rms_ratio(value, want) < 1e-5
    with pytest.raises(ArgumentError, match="allowed: ort, standard"):
        torch_program.to_onnx(program, "old")


class Block(torch.nn.Module):
    """A gated-delta-net layer with its projections, and a mixture of experts behind it."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(24, 192 + 64 + 8), torch.nn.Linear(64, 24)
        self.router = torch.nn.Linear(24, 6)
        for name, shape in {
            "taps": (192, 4), "A_log": (4,), "dt_bias": (4,), "norm": (16,), "w13": (6, 2 * 20, 24), "w2": (6, 24, 20)
        }.items():  # fmt: skip
            setattr(self, name, torch.nn.Parameter(torch.randn(shape) / 4))

    def forward(self, x, conv_state, state):
        mixed, z, a, b = self.inner(x).split([192, 64, 4, 4], -1)
        conv_state = conv_state.clone()
        mixed = tvm_gdn.causal_conv1d_update(mixed.transpose(1, 2), conv_state, self.taps, None, "silu").transpose(1, 2)
        q, k, v = (
            part.unflatten(-1, (-1, width)) for part, width in zip(mixed.split([64, 64, 64], -1), (32, 32, 16), strict=True)
        )
        g, beta = tvm_gdn.fused_gdn_gating(self.A_log, a, b, self.dt_bias)
        o, state = tvm_gdn.chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        o = tvm_gdn.rms_norm_gated(o.reshape(-1, 16), self.norm, z.reshape(-1, 16)).view(*x.shape[:2], 64)
        rows = (x + self.outer(o)).flatten(0, 1)
        weights, ids = tvm_gdn.moe_route(self.router(rows), 2)
        out = rows + tvm_gdn.fused_experts(rows, self.w13, self.w2, weights, ids)
        return out.view(x.shape), conv_state, state


def test_a_layer_with_experts_goes_to_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = Block().eval().requires_grad_(False)
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    example = (torch.randn(2, 6, 24), torch.randn(2, 192, 3), torch.randn(2, 4, 32, 16))
    program = torch.export.export(block, example, dynamic_shapes=({0: batch, 1: time}, {0: batch}, {0: batch}))
    own = [str(node.target) for node in program.graph.nodes if "tvm_gdn" in str(node.target)]
    names = ["causal_conv1d_update", "fused_gdn_gating", "chunk_gated_delta_rule", "rms_norm_gated", "moe_route", "fused_experts"]
    assert own == [f"tvm_gdn.{name}.default" for name in names]
    feeds = {"x": torch.randn(3, 19, 24), "conv_state": torch.randn(3, 192, 3), "state": torch.randn(3, 4, 32, 16)}
    want = block(*feeds.values())
    for profile, domain in (("ort", "com.microsoft"), ("standard", "")):
        path = tmp_path / f"{profile}.onnx"
        torch_program.to_onnx(program, profile).save(str(path))
        onnx.checker.check_model(str(path), full_check=True)
        nodes = {(node.domain, node.op_type) for node in onnx.load(str(path)).graph.node}
        assert {(domain, "LinearAttention"), (domain, "CausalConvWithState")} <= nodes
        for value, right in zip(onnx_run.run_onnxruntime(path, feeds, None), want, strict=True):
            assert parity.rms_ratio(value, right) < 1e-5
    # The program is as it was.
    assert own == [str(node.target) for node in program.graph.nodes if "tvm_gdn" in str(node.target)]


def test_what_onnx_cannot_say_of_a_model_is_refused():
    pytest.importorskip("onnxscript")

    class Updates(torch.nn.Module):
        def forward(self, x, state, taps):
            return tvm_gdn.causal_conv1d_update(x, state, taps)

    class Stats(torch.nn.Module):
        def forward(self, ids):
            return tvm_gdn.expert_stats(ids, 8)

    example = (torch.randn(2, 12, 5), torch.randn(2, 12, 3), torch.randn(12, 4))
    with pytest.raises(ExportError, match="updates state in place, which ONNX cannot: clone it"):
        torch_program.to_onnx(torch.export.export(Updates(), example))
    with pytest.raises(ExportError, match=r"expert_stats.default: no translation.*moe_route"):
        torch_program.to_onnx(torch.export.export(Stats(), (torch.zeros(4, 2, dtype=torch.int64),)))


class Decode(torch.nn.Module):
    """Three decode operators on one pool, which is returned."""

    def __init__(self):
        super().__init__()
        for name, shape in {"A_log": (4,), "dt_bias": (4,), "taps": (192, 4)}.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape) / 4, requires_grad=False))

    def forward(self, mixed, a, b, conv_state, pool, slots):
        conv_state, pool = conv_state.clone(), pool.clone()
        first = tvm_gdn.fused_conv_gated_delta_rule_update(
            mixed,
            conv_state,
            self.taps,
            a,
            b,
            self.A_log,
            self.dt_bias,
            pool,
            conv_state_indices=slots,
            initial_state_indices=slots,
        )
        q, k, v = (x.unflatten(-1, (-1, w))[:, None] for x, w in zip(mixed.split([64, 64, 64], -1), (32, 32, 16), strict=True))
        second = tvm_gdn.fused_sigmoid_gating_delta_rule_update(
            self.A_log, a[:, None], self.dt_bias, 1.0, 20.0, q, k, v, b[:, None], pool, slots, use_qk_l2norm_in_kernel=True
        )
        third = tvm_gdn.packed_decode_gated_delta_rule(mixed, a, b, self.A_log, self.dt_bias, pool, slots)
        return first, second, third, conv_state, pool


def test_a_decode_step_on_a_pool_goes_to_onnx(tmp_path):
    """Padding writes nothing; rows that no sequence owns stay bit for bit."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = Decode(), torch.export.Dim("batch", max=6)

    def inputs(slots):
        rows = [torch.randn(len(slots), width) for width in (192, 4, 4)]
        return [*rows, torch.randn(6, 192, 3), torch.randn(6, 4, 32, 16), torch.tensor(slots)]

    dims = ({0: batch}, {0: batch}, {0: batch}, None, None, {0: batch})
    program = torch.export.export(model, tuple(inputs([1, 2, 4])), dynamic_shapes=dims)
    given = inputs([5, -1, 0, 2])
    want = model(*given)
    for profile in ("ort", "standard"):
        made = torch_program.to_onnx(program, profile)
        made.save(str(tmp_path / "m.onnx"))
        feeds = dict(zip([x.name for x in made.model.graph.inputs], given, strict=True))
        got = onnx_run.run_onnxruntime(tmp_path / "m.onnx", feeds, None)
        for value, right in zip(got, want, strict=True):
            assert parity.rms_ratio(value, right) < 1e-5
        assert torch.equal(got[4][[1, 3, 4]], given[4][[1, 3, 4]]) and not torch.equal(got[4][[5, 0, 2]], given[4][[5, 0, 2]])


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("rms_norm_gated", "D=20,dtype=bfloat16"),
        ("fused_gdn_gating", "dtype=float32"),
        pytest.param(UPDATE, "K=32,V=16,dtype=bfloat16,state_v_first=1", marks=pytest.mark.slow),
        pytest.param(
            "causal_conv1d_fn",
            "W=4,L=3,dtype=float32,state=float32,with=conv_states+cache_indices+has_initial_state",
            marks=pytest.mark.slow,
        ),
        (FUSED, "K=32,V=16,W=4,L=3,dtype=float32,state=float32"),
        ("moe_route", "E=16,dtype=float32,scoring=sigmoid,num_expert_group=4,topk_group=2,with=correction_bias"),
        ("fused_experts", "D=24,I=40,dtype=float32"),
    ],
)
def test_torch_programs_of_other_operators(op, dims, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    wanted = request(op, dims, heads=(("E", 6), ("k", 3)) if op == "fused_experts" else ())
    fill(tmp_path, torch_program.build(wanted))
    checks = torch_program.verify(wanted, tmp_path)
    assert len(checks) == 3 and all(check.passed for check in checks), checks


# --- GPU sources


GPU_KERNELS = [
    ("opencl-src", ".cl", UPDATE, "K=16,V=32,dtype=float32"),
    ("cuda-src", ".cu", CHUNK, "K=32,V=16,dtype=bfloat16"),
    ("musa-src", ".mu", "rms_norm_gated", "D=33,dtype=bfloat16"),
]
GPU_MORE = [
    ("cuda-src", ".cu", UPDATE, "K=16,V=32,dtype=float32"),
    (
        "cuda-src",
        ".cu",
        "causal_conv1d_fn",
        "W=4,L=3,dtype=bfloat16,state=float32,with=conv_states+has_initial_state+cache_indices",
    ),
    ("musa-src", ".mu", "chunk_kda", "K=32,V=32,dtype=bfloat16"),
    ("musa-src", ".mu", "moe_sort", ""),
    ("opencl-src", ".cl", "causal_conv1d_update", "W=4,L=3,dtype=float32,state=float32,activation=silu"),
    ("metal-src", ".metal", "rms_norm_gated", "D=33,dtype=float32,norm_before_gate=0"),
    ("metal-src", ".metal", "moe_route", "E=16,dtype=float32"),
    ("webgpu-src", ".wgsl", "rms_norm_gated", "D=33,dtype=float32"),
    ("webgpu-src", ".wgsl", "packed_decode_gated_delta_rule", "K=32,V=32,dtype=float32,initial_state_indices=int32"),
]


@needs_cxx
@pytest.mark.parametrize(
    ("form", "suffix", "op", "dims"), [*GPU_KERNELS, *(pytest.param(*kernel, marks=pytest.mark.slow) for kernel in GPU_MORE)]
)
def test_gpu_source(form, suffix, op, dims, tmp_path, capsys):
    """What is run is launched by the written description alone: names, order of parameters, sizes, scratch memory, grid."""
    path = tmp_path / "kernel"
    assert run("--op", op, "--format", form, "--dims", dims, "-o", path) == 0
    told = capsys.readouterr().out
    ran = "this source" if form == "cuda-src" else "the same TIR as CUDA C"
    assert re.search(rf"{ran}, launched by the description, [^\n]*device emulation on the CPU +ok", told), told
    (source,), (description,) = path.glob(f"*{suffix}"), path.glob("*.json")
    found, text = json.loads(description.read_text()), source.read_text()
    assert found["arguments"] and set(found["tensors"]) <= set(found["arguments"])
    known = {"min", "max", *found["arguments"], *found["workspaces"]}
    known |= {name for tensor in found["tensors"].values() for name in (*tensor["shape"], *tensor.get("strides", ()))}
    for kernel in found["kernels"]:
        assert kernel["name"] in text and {"blockIdx.x", "threadIdx.x"} <= set(kernel["launch"])
        # Every value can be worked out from the operator's own arguments.
        values = [*kernel["launch"].values(), *(argument["value"] for argument in kernel["arguments"])]
        assert {name for value in values for name in re.findall(r"[A-Za-z_]\w*", value)} - {"if", "else", "or", "and"} <= known
    if form == "opencl-src":
        assert "shuffle" not in text and "barrier" not in text and "__local" not in text
    if form in {"opencl-src", "metal-src", "webgpu-src"}:
        assert "tvm_gdn_" not in text


def test_gpu_languages_name_algorithms_that_have_a_schedule():
    for language, algorithms in gpu_source.ALGORITHMS.items():
        for algorithm in algorithms:
            assert schedule.find_space(algorithm, target.resolve(gpu_source.LANGUAGES[language][1]))


@needs_cxx
def test_a_wrong_launch_description_fails(tmp_path):
    """The description takes part in the verification: two strides in turn, half of the blocks, another order of pointers."""
    wanted = request("rms_norm_gated", "D=33,dtype=float32")
    build, verify = gpu_source.maker("cuda")
    files = build(wanted)
    fill(tmp_path, files)
    assert all(check.passed for check in verify(wanted, tmp_path))
    name = f"{wanted.symbol}.json"
    for change in (
        lambda kernel: kernel["launch"].update({"blockIdx.x": "0"}),
        lambda kernel: kernel["arguments"][1].update(value="x"),
        lambda kernel: kernel["arguments"][4].update(value="M"),
    ):
        found = json.loads(files[name])
        change(found["kernels"][0])
        (tmp_path / name).write_text(json.dumps(found))
        assert verify(wanted, tmp_path)[1].passed is False


def test_gpu_sources_refuse_by_name(tmp_path, capsys):
    assert run("--op", CHUNK, "--format", "metal-src", "--dims", "K=32,V=32", "-o", tmp_path / "x") == 2
    text = capsys.readouterr().err
    assert f"metal-src has no {CHUNK}; {CHUNK} has: onnx" in text and "metal-src has: fused_gdn_gating, " in text
    assert "cuda-src: float32, bfloat16" in text
    assert run("--op", UPDATE, "--format", "opencl-src", "--dims", "K=32,V=16,dtype=float32", "-o", tmp_path / "x") == 2
    assert "V = 16; allowed: multiples of 32" in capsys.readouterr().err
    words = ("--op", "fused_gdn_gating", "--format", "webgpu-src", "--dims", "dtype=bfloat16", "-o", tmp_path / "x")
    assert run(*words) == 2
    assert "a bfloat16" in capsys.readouterr().err and not list(tmp_path.iterdir())
