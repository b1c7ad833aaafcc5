"""Exported ONNX: checked and run by onnx and onnxruntime, in every profile, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from exports import CHUNK, CONV, FUSED, HEADS, LAYER, PACKED_TREE, SIGMOID, UPDATE, request, run

import tvm_gdn
from tvm_gdn import parity, reference, reference_moe
from tvm_gdn.export import onnx_files, onnx_layer, onnx_moe, onnx_parts, onnx_run
from tvm_gdn.export.artifact import ExportError, all_passed, draw, fill
from tvm_gdn.ops import OPS

PROFILES = onnx_files.profiles("chunk")
POOL = "with=initial_state_source+initial_state_indices"
TREE = f"{POOL}+intermediate_states_buffer+intermediate_state_indices+retrieve_parent_token"
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
    # Packed sequences; a chain and a tree of speculated tokens.
    *((CHUNK, "K=32,V=16,dtype=float32,with=initial_state+cu_seqlens", {"profile": profile, "chunk": 16}) for profile in PROFILES),
    ("chunk_kda", "K=16,V=32,dtype=float32,with=cu_seqlens", {"profile": "chunked", "chunk": 16, "tokens": 37}),
    (SIGMOID, f"K=16,V=32,dtype=bfloat16,state_v_first=1,cu_seqlens=int32,{POOL}+cu_seqlens", {"profile": "decomposed"}),
    (f"{CHUNK}_update", f"K=32,V=16,dtype=float32,{POOL}+cu_seqlens+final_state", {"profile": "standard"}),
    *(("causal_conv1d_fn", f"W=4,L={L},dtype={dtype},state=float32,with={'+'.join(CONV)}", {"profile": profile, "heads": (("D", 12),)})
      for profile, L, dtype in (("standard", 3, "float32"), ("decomposed", 5, "bfloat16"), ("ort", 3, "float32"))),
    ("causal_conv1d_fn", "W=3,L=2,dtype=float32,state=float32,with=query_start_loc",
     {"profile": "decomposed", "heads": (("D", 12),), "tokens": 9}),
    (UPDATE, f"K=32,V=16,dtype=bfloat16,state=bfloat16,{POOL}+intermediate_states_buffer", {"profile": "chunked", "tokens": 5}),
    (UPDATE, f"K=32,V=16,dtype=float32,state_v_first=1,{TREE}", {"profile": "standard", "tokens": 13}),
    (SIGMOID, "K=16,V=32,dtype=float32,with=intermediate_states_buffer+retrieve_parent_token", {"profile": "standard", "tokens": 1}),
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
    ("dims", "options", "message"),
    [
        (
            PACKED_TREE,
            {"tokens": 8},
            "cu_seqlens together with intermediate_states_buffer has no ONNX form; allowed: cu_seqlens without",
        ),
        (TREE, {}, "give --tokens N"),
        (f"state=bfloat16,{TREE}", {"tokens": 8}, "bfloat16 buffer has none; allowed: .*=float32"),
    ],
)
def test_onnx_refuses_what_it_cannot_say(dims, options, message):
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match=message):
        onnx_files.build(request(UPDATE, f"K=32,V=32,{dims}", profile="standard", **options))


def test_onnx_packed_sequences_do_not_touch_each_other(tmp_path):
    """Bounds of every kind, one model: empty sequences anywhere, one alone; NaN in one sequence stays there."""
    pytest.importorskip("onnxruntime")
    wanted = request(CHUNK, "K=32,V=16,dtype=float32,with=initial_state+cu_seqlens", profile="standard", heads=HEADS)
    fill(tmp_path, onnx_files.build(wanted))
    for lengths in ((0, 5, 0, 0, 63, 1, 0), (17,), (1, 1, 1)):
        total, count = sum(lengths), len(lengths)
        q, k, v = torch.randn(1, total, 2, 32), torch.randn(1, total, 2, 32), torch.randn(1, total, 4, 16)
        g, beta, state = -torch.rand(1, total, 4), torch.rand(1, total, 4), torch.randn(count, 4, 32, 16)
        v[0, 0] = float("nan")
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        feeds = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state, "cu_seqlens": bounds}
        o, final = onnx_run.run_onnxruntime(tmp_path / f"{CHUNK}.onnx", feeds, ["o", "final_state"])
        want, last = reference.chunk_gated_delta_rule(
            q, k, v, g, beta, None, state, True, bounds, use_qk_l2norm_in_kernel=True, exact=True
        )
        assert parity.rms_ratio(o, want) < 1e-5 and parity.rms_ratio(final, last) < 1e-5
        hit = next(n for n, length in enumerate(lengths) if length)
        others = [n for n in range(count) if n != hit]
        assert final[hit].isnan().any() and final[others].isfinite().all() and o[0, lengths[hit] :].isfinite().all()


def test_onnx_tree_of_a_sequence_that_stores_nothing(tmp_path):
    """Slot -1 of the buffer: a step that has a parent starts from zeros, as in the operator; the buffer stays bit for bit."""
    pytest.importorskip("onnxruntime")
    wanted = request(UPDATE, f"K=32,V=16,dtype=float32,{TREE}", profile="decomposed", heads=HEADS, tokens=7)
    fill(tmp_path, onnx_files.build(wanted))
    feeds, _ = draw(wanted, B=3, T=7, S=5, H=2, HV=4)
    feeds["intermediate_state_indices"] = torch.tensor([2, -1, 0])
    feeds["intermediate_states_buffer"] = torch.randn(4, 9, 4, 32, 16)
    feeds["retrieve_parent_token"] = torch.tensor([[5, 0, 0, 1, -1, 4, 3], [0, 0, 1, -1, 2, 4, 0], [-1, -1, 1, 2, 3, 4, 5]])
    want = parity.expected(OPS[UPDATE], feeds)
    names = ["o", "next_initial_state_source", "next_intermediate_states_buffer"]
    given = {name: x for name, x in feeds.items() if isinstance(x, torch.Tensor)}
    got = onnx_run.run_onnxruntime(tmp_path / f"{UPDATE}.onnx", given, names)
    for value, name in zip(got, ("o", "initial_state_source", "intermediate_states_buffer"), strict=True):
        assert parity.rms_ratio(value, want[name]) < 1e-5
    before = feeds["intermediate_states_buffer"]
    assert torch.equal(got[2][[1, 3]], before[[1, 3]]) and torch.equal(got[2][:, 7:], before[:, 7:])
