"""Where a device's chunk schedule has no room for a shape, the token recurrence serves under the chunk operator's name, and says so."""

import json
import logging

import pytest
import torch
from compilers import needs_cxx

import tvm_gdn
from tvm_gdn import build, cases, check, dispatch, kernel_cache, pack, parity, records, schedule
from tvm_gdn.autograd import BackwardError
from tvm_gdn.commands import aot
from tvm_gdn.errors import PackError, TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import EMULATED, named, resolve

CHUNK, KDA, UPDATE = "chunk_gated_delta_rule", "chunk_kda", "chunk_delta_rule_update"
STATES = {"with": ("initial_state",), "output_final_state": True}
POOL = {"with": ("initial_state_source", "initial_state_indices", "cu_seqlens"), "padding": True, "S": 5}
WIDE = {"B": 1, "T": 65, "H": 1, "HV": 2, "K": 192, "V": 8, "dtype": "float32", **STATES}
#: A V that is no multiple of 16: refused without a trace of the algorithm.
NARROW = {"B": 1, "T": 65, "H": 1, "HV": 2, "K": 128, "V": 24, "dtype": "float32", **STATES}


@pytest.fixture
def emulated(monkeypatch, request):
    monkeypatch.setenv("TVM_GDN_TARGET", f"{EMULATED}{request.param}")
    dispatch.reset()
    yield resolve(f"{EMULATED}{request.param}")
    monkeypatch.undo()
    dispatch.reset()


def test_a_second_algorithm_takes_the_same_arguments():
    seconds = {op: spec.second for op, spec in OPS.items() if spec.second}
    assert set(seconds) == {op for op in OPS if op.startswith("chunk_")}
    for op, second in seconds.items():
        spec = OPS[op]
        assert second is OPS[op.replace("chunk", "fused_recurrent")] and second.second is None
        assert [arg for arg in second.inputs if arg.name in {own.name for own in spec.inputs}] == list(spec.inputs)
        assert (second.outputs, second.static_axes, second.traits) == (spec.outputs, spec.static_axes, spec.traits)


@needs_cxx
@pytest.mark.parametrize(
    ("emulated", "op", "case", "reason"),
    [
        ("cuda-sm80", CHUNK, WIDE, "K = 192 needs more than"),
        ("rocm-gfx942", KDA, NARROW, "V = 24 is no multiple of 16"),
        ("musa-mp31", UPDATE, {"lengths": (65, 0, 3), "H": 1, "HV": 2, "K": 128, "V": 8, **POOL}, "K = 128 needs more than"),
    ],
    indirect=["emulated"],
)
def test_shapes_without_room_meet_the_reference_and_are_told_of(emulated, caplog, op, case, reason):
    with caplog.at_level(logging.WARNING, "tvm_gdn"):
        result = parity.check_case(OPS[op], case)
    assert result.passed, result
    assert result.served == f"compiled ({emulated.name}, recurrent default)"
    (told,) = [message for message in caplog.messages if "second algorithm (recurrent default)" in message]
    assert told.startswith(f"{op} [K={case['K']} ") and emulated.name in told and reason in told
    for name, value in parity.expected(OPS[op], cases.draw(OPS[op], case)).items():
        assert parity.rms_ratio(torch.zeros_like(value), value) > 0.5, name


@pytest.mark.parametrize("emulated", ["cuda-sm80"], indirect=True)
def test_knobs_that_were_asked_for_are_still_refused(emulated):
    """Only a plan of the schedule's own may be replaced."""
    knobs = {"chunk": 64, "v_tile": 8, "warps": 8, "ahead": 8, "together": 2}
    geometry = check.geometry_of(OPS[CHUNK], cases.draw(OPS[CHUNK], WIDE))
    with pytest.raises(TargetError, match=r"'chunk': 64.* bytes of shared memory, a block has 101376"):
        build.scheduled(build.Request(OPS[CHUNK], geometry, knobs), emulated)


def test_records_of_the_second_operator_apply(monkeypatch):
    spec, target = OPS[KDA], named("rocm-gfx942")
    geometry = check.geometry_of(spec, cases.draw(spec, NARROW))
    before, place = schedule.choose(spec, geometry, target), kernel_cache.folder_of(spec, geometry, target)
    tuned = next({**before.knobs, "group": n} for n in (1, 2) if n != before.knobs["group"])
    monkeypatch.setattr(records, "lookup", lambda op, *_: {"knobs": tuned} if op is spec.second else None)
    found = schedule.choose(spec, geometry, target)
    assert (before.words, found.words, found.knobs) == ("recurrent default", "recurrent tuned", tuned)
    assert kernel_cache.folder_of(spec, geometry, target) != place


@needs_cxx
@pytest.mark.parametrize("emulated", ["rocm-gfx942"], indirect=True)
def test_packs_hold_the_kernel_for_machines_without_a_compiler(emulated, tmp_path, monkeypatch):
    spec, folder = OPS[KDA], tmp_path / "pack"
    arguments = cases.draw(spec, NARROW)
    aot.build_pack([(spec, check.geometry_of(spec, arguments))], emulated, folder)
    (entry,) = pack.read_whole(folder).manifest.kernels
    assert (entry.op, entry.schedule) == (KDA, "recurrent default") and "V = 24" in entry.refusal
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TVM_GDN_PACK_PATH", str(folder))
    monkeypatch.setenv("TVM_GDN_DISABLE_JIT", "1")
    dispatch.reset()

    def layer(q, k, v, g, beta, initial):
        return tvm_gdn.chunk_kda(q, k, v, g, beta, initial_state=initial, output_final_state=True)

    given = [arguments[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
    want, eager = parity.expected(spec, arguments), layer(*given)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*given)
    for place, name in enumerate(("o", "final_state")):
        assert parity.rms_ratio(eager[place], want[name]) < 1e-5
        assert torch.equal(compiled[place], eager[place])
    given[0].requires_grad_()
    with pytest.raises(BackwardError, match="chunk_kda has no backward"):
        layer(*given)[0].sum().backward()
    text = json.loads((folder / pack.MANIFEST).read_text())
    text["kernels"][0]["refusal"] = 3
    (folder / pack.MANIFEST).write_text(json.dumps(text))
    with pytest.raises(PackError, match=r"kernels\[0\]\.refusal must be text"):
        pack.read(folder)
