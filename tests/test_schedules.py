"""Design spaces: every operator resolves on every CPU target and every shape, and the one definition lowers to a GPU too."""

import ast
import contextlib
import itertools
import math
import re
from pathlib import Path

import pytest
from calls import each_operator

from tvm_gdn import cases, check, schedule
from tvm_gdn.build import prim_func
from tvm_gdn.errors import TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve, target_names

SHAPES = ((1, 1), (6, 10), (7, 13), (8, 8), (10, 6), (20, 12), (128, 128), (256, 64), (64, 256))


def geometry(name, K=64, V=32, **more):
    case = {**OPS[name].cases[0], "K": K, "V": V, **more}
    return check.geometry_of(OPS[name], cases.draw(OPS[name], case))


#: Algorithms that AMD's architectures have schedules of their own for; `rocm` stands for the one that is present.
MATRIX_UNITS = {"chunk", "moe_experts"}


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("name", each_operator)
def test_every_operator_resolves_on_every_target(name, target):
    if target == "rocm" and OPS[name].algorithm in MATRIX_UNITS:
        with pytest.raises(TargetError, match="no schedule"):
            schedule.choose(OPS[name], geometry(name), named(target))
        return
    choice = schedule.choose(OPS[name], geometry(name), named(target))
    assert choice.origin in {"default", "tuned", "generic"}


@pytest.mark.parametrize(
    ("name", "target", "more"),
    [
        ("chunk_gated_delta_rule", "x86-avx512", {}),
        ("fused_recurrent_gated_delta_rule_update", "x86-avx512", {}),
        ("packed_decode_gated_delta_rule", "cuda-sm90", {"state_dtype": "bfloat16"}),
        ("packed_decode_gated_delta_rule", "cuda-sm90", {"state_v_first": True}),
        ("fused_recurrent_gated_delta_rule_update", "cuda-sm90", {}),
    ],
)
@pytest.mark.parametrize(("K", "V"), SHAPES)
def test_defaults_are_among_the_choices_for_any_shape(name, target, more, K, V):
    shape = geometry(name, K, V, **more)
    space, _ = schedule.find_space(OPS[name].algorithm, named(target))
    assert schedule.fits(space.default(shape), space.knobs(shape))
    space.tiles(shape, **space.default(shape))


@pytest.mark.parametrize(("K", "dtype", "ahead"), [(64, "float32", True), (128, "float32", False), (128, "bfloat16", True)])
def test_chunks_go_ahead_of_states_where_there_is_room(K, dtype, ahead):
    space, _ = schedule.find_space("chunk", named("cuda-sm80"))
    shape = geometry("chunk_gated_delta_rule", K, K, dtype=dtype)
    knobs = space.default(shape)
    assert bool(knobs["ahead"]) == ahead
    assert max(space.tiles(shape, **knobs).arenas.values()) <= space.shared


@pytest.mark.parametrize(("K", "V", "moved"), [(128, 128, True), (192, 128, True), (256, 128, False), (96, 40, False)])
def test_the_copy_engine_moves_states_that_fit(K, V, moved):
    """Two blocks share a multiprocessor's memory; other states stay in registers in every call."""
    space, _ = schedule.find_space("recurrent", named("cuda-sm90"))
    shape = geometry("packed_decode_gated_delta_rule", K, V, state_dtype="float32")
    assert (space.default(shape)["few"] < max(space.knobs(shape)["few"])) == moved


@pytest.mark.parametrize(("target", "shared"), [("cuda-sm90", 227 * 1024), ("cuda-sm80", 99 * 1024)])
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_fused_step_has_no_more_shared_memory_than_a_block(state, target, shared):
    """A driver refuses to launch what needs more; a tuner is told before it compiles."""
    spec, item = OPS["fused_conv_gated_delta_rule_update"], 4 if state == "float32" else 2
    shape = geometry(spec.name, 128, 128, state_dtype=state)
    space, _ = schedule.find_space(spec.algorithm, named(target))
    refused, largest = [], (0, {})
    choices = space.knobs(shape)
    for values in itertools.product(*choices.values()):
        knobs = dict(zip(choices, values, strict=True))
        v_tile = knobs["column_lanes"] * knobs["columns"]
        states = 128 * v_tile * knobs["group"] * item
        try:
            tiles = space.tiles(shape, **knobs)
        except TargetError as error:
            assert f"a block has {shared}" in str(error) and str(knobs) in str(error)
            refused.append(knobs)
            assert states + 4 * (2 * 128 + knobs["group"] * v_tile) > shared
            continue
        except ValueError:  # what a thread has is no vector: four columns of bf16, for one
            continue
        if knobs["place"] == "shared":
            largest = max(largest, (tiles.memory, knobs), key=lambda found: found[0])
    assert ({"column_lanes": 32, "columns": 4, "group": 4, "place": "shared"} in refused) == (item == 4)
    text = prim_func(spec, shape, space.tiles(shape, **largest[1])).script()
    made = re.findall(r'T\.alloc_(?:shared|buffer)\(\(([\d, ]+)\)(?:, "(\w+)")?(?:, scope="(\S+)")?\)', text)
    made = [(sizes, dtype) for sizes, dtype, scope in made if scope in {"", "shared.dyn"}]
    total = sum(
        math.prod(int(n) for n in re.findall(r"\d+", sizes)) * (4 if dtype in {"", "float32"} else 2) for sizes, dtype in made
    )
    assert len(made) == 4 and total == largest[0] <= shared


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("packed_decode_gated_delta_rule", "StepTiles"),
        ("fused_recurrent_gated_delta_rule_update", "StepTiles"),
        ("fused_conv_gated_delta_rule_update", "ConvolvedStepTiles"),
    ],
)
def test_a_target_has_the_listed_operations(name, protocol, target):
    """Algorithms ask for each of them and for `PlainTiles`' by name; `ask_state` and the like only where a target says so."""
    from tvm_gdn.ops.tir import plain_tiles, step_tiles

    listed = getattr(step_tiles, protocol)
    wanted = {name for kind in (listed, *listed.__mro__) for name in (*vars(kind), *vars(kind).get("__annotations__", {}))}
    wanted = {name for name in wanted | set(vars(plain_tiles.PlainTiles)) if not name.startswith("_")}
    tiles = schedule.choose(OPS[name], geometry(name), named(target)).tiles(geometry(name))
    optional = {"ask_state", "take_state"} if not hasattr(tiles, "ask_state") else set()
    optional |= {"fit_rows"} if not tiles.strip else set()
    optional |= {"take_rows"} if not getattr(tiles, "lines_shared", True) else set()
    assert not {name for name in wanted - optional if not hasattr(tiles, name)}


def asks(node):
    """Whether a node of a syntax tree asks if a name is there: `hasattr`, or `getattr` with something in its place."""
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    return name == "hasattr" or (name == "getattr" and len(node.args) > 2)


def test_algorithms_never_ask_whether_a_target_has_a_name():
    assert any(map(asks, ast.walk(ast.parse("x = getattr(tiles, 'strip', 0)"))))
    for path in (Path(__file__).parent.parent / "tvm_gdn" / "ops" / "tir").glob("*.py"):
        assert not any(map(asks, ast.walk(ast.parse(path.read_text())))), path.name


def test_a_name_that_the_kernel_does_not_take_is_an_error():
    from dataclasses import replace

    from tvm_gdn.errors import BuildError
    from tvm_gdn.spec import Scalar

    spec = OPS["fused_gdn_gating"]
    wrong = replace(spec, inputs=(*spec.inputs, Scalar("softplus_gamma", "float", 1.0)))
    shape = check.geometry_of(spec, cases.draw(spec, spec.cases[0]))
    with pytest.raises(BuildError, match="softplus_gamma"):
        prim_func(wrong, shape, schedule.choose(spec, shape, named("x86")).tiles(shape))


@pytest.mark.parametrize("name", ["packed_decode_gated_delta_rule", "fused_recurrent_kda"])
def test_the_same_definition_lowers_to_cuda(name):
    import tvm

    target = resolve('{"device": "cuda", "codegen": {"kind": "cuda", "arch": "sm_80"}}')
    space, _ = schedule.find_space("recurrent", named("x86"))
    cuda = schedule._SPACES["recurrent", "cuda"]
    assert cuda is not space
    shape = geometry(name, 128, 128)
    function = prim_func(OPS[name], shape, cuda.tiles(shape, **cuda.default(shape)))
    with tvm.target.Target(dict(target.codegen), host="llvm"):
        module = tvm.tirx.transform.BindTarget(tvm.target.Target(dict(target.codegen), host="llvm"))(
            tvm.IRModule.from_expr(function)
        )
    text = module.script()
    assert "threadIdx.x" in text
    assert "blockIdx.x" in text
    assert "warp_shuffle_xor" in text


def test_tracing_reads_no_callers_source_and_changes_no_function(monkeypatch):
    import inspect

    import tvm
    from tvm.script.parser.core.parser import ScriptMacro

    spec, target, before = OPS["fused_gdn_gating"], named("x86"), ScriptMacro._find_parser_def
    shape, asked = check.geometry_of(spec, cases.draw(spec, spec.cases[0])), []

    def traced():
        return prim_func(spec, shape, schedule.choose(spec, shape, target).tiles(shape))

    outer_frames = inspect.getouterframes
    monkeypatch.setattr(inspect, "getouterframes", lambda *args: asked.append(args) or outer_frames(*args))
    quick = traced()
    assert len(asked) <= 2  # of the decorator, not of every macro
    assert ScriptMacro._find_parser_def is before
    monkeypatch.setattr("tvm_gdn.build.quick_macros", contextlib.nullcontext)
    plain = traced()
    assert len(asked) > 5
    tvm.ir.assert_structural_equal(quick, plain)
