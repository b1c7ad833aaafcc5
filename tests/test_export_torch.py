"""Exported torch programs, and models that go to ONNX through `torch.export`."""

from __future__ import annotations

import pytest
import torch
from exports import CHUNK, FUSED, UPDATE, request, run

import tvm_gdn
from tvm_gdn import parity
from tvm_gdn.errors import ArgumentError
from tvm_gdn.export import onnx_run, torch_program
from tvm_gdn.export.artifact import ExportError, fill


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

    class Packed(torch.nn.Module):
        def forward(self, q, v, gate, bounds):
            return tvm_gdn.chunk_gated_delta_rule(q, q, v, -gate, gate, cu_seqlens=bounds)[0]

    packed = (torch.randn(1, 9, 2, 32), torch.randn(1, 9, 4, 16), torch.rand(1, 9, 4), torch.tensor([0, 5, 9]))
    with pytest.raises(
        ExportError, match="cu_seqlens is not translated in models; allowed: calls without it, or the operator alone"
    ):
        torch_program.to_onnx(torch.export.export(Packed(), packed))
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
        pytest.param(FUSED, "K=32,V=16,W=4,L=3,dtype=float32,state=float32", marks=pytest.mark.slow),
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
