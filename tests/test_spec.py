"""What a SPEC can say, on operators that exist nowhere: schema, generated functions, checks, geometry, cases."""

from __future__ import annotations

import pytest
import torch

from tvm_gdn import cases, check, torch_ops
from tvm_gdn.errors import ArgumentError
from tvm_gdn.spec import BYTES, FLOATS, INTS, Axis, Geometry, OpSpec, Output, Scalar, Tensor

SCORING = Scalar(
    "scoring", "str", "softmax", static=True, choices=(("softmax", "softmax"), ("sigmoid", "sigmoid"), (None, "none"))
)
TOY = OpSpec(
    name="toy",
    summary="",
    algorithm="toy",
    inputs=(
        Tensor("x", "T 2*I", axes_if=("bounds", "2*I T"), role="data", strides="any"),
        Tensor("packed", "E I D/2", dtypes=BYTES, role="weight"),
        Scalar("top_k", "int", drawn=3),
        Tensor("groups", "E G", optional=True),
        Tensor("bounds", "N+1", dtypes=INTS, optional=True, values=lambda draw: torch.arange(draw.shape[0])),
        SCORING,
    ),
    outputs=(
        Output("ids", "T top_k", like="int32"),
        Output("o", "T D", like="data"),
        Output("loads", "N 2*top_k+1", like="float32"),
        Output("mean", "", like="float32"),
    ),
    static_axes=("I", "D", "G"),
    derived=(("N", ("bounds", "T")),),
)
CASE = {"T": 5, "I": 4, "E": 2, "D": 6, "N": 5, "dtype": "bfloat16", "weight_dtype": "uint8"}


def test_sizes_are_expressions():
    for text, size, named in (("K", 8, 8), ("2*I", 8, 4), ("D/2", 8, 16), ("N+1", 8, 7), ("W-1", 8, 9), ("3", 3, None)):
        axis = Axis.parse(text)
        assert axis.size({axis.name: named}) == size
        if named is not None:
            assert axis.named(size) == named
            assert eval(axis.expression("n"), {"n": named}) == size
            assert eval(axis.named_expression("s"), {"s": size}) == named
    assert Axis.parse("2*I").named(7) is None
    with pytest.raises(ValueError, match="write a name"):
        Axis.parse("I*2")


def test_schema():
    assert TOY.schema() == (
        'toy(Tensor x, Tensor packed, int top_k, Tensor? groups=None, Tensor? bounds=None, str? scoring="softmax") -> '
        "(Tensor, Tensor, Tensor, Tensor)"
    )


def test_cases_draw_every_dtype_and_layout():
    a = cases.draw(TOY, CASE)
    assert (a["x"].shape, a["x"].dtype, a["packed"].shape, a["packed"].dtype) == ((5, 8), torch.bfloat16, (2, 4, 3), torch.uint8)
    assert (a["groups"], a["bounds"], a["top_k"], a["scoring"]) == (None, None, 3, "softmax")
    b = cases.draw(TOY, {**CASE, "with": ("bounds",), "index_dtype": "int32"})
    assert (b["x"].shape, b["bounds"].dtype) == ((8, 5), torch.int32)
    meta = cases.meta(TOY, {**CASE, "T": 10**9})
    assert meta["x"].shape == (10**9, 8)
    assert check.geometry_of(TOY, meta) == check.geometry_of(TOY, a)


@pytest.mark.parametrize("given", [(), ("bounds",), ("groups",)])
def test_outputs_have_derived_sizes_and_fixed_dtypes(given):
    a = cases.draw(TOY, {**CASE, "N": 4, "G": 7, "with": given})
    ids, o, loads, mean = torch_ops.fake_function(TOY)(*a.values())
    assert (ids.shape, ids.dtype) == ((5, 3), torch.int32)
    assert (o.shape, o.dtype) == ((5, 6), torch.bfloat16)
    assert loads.shape == (4 if given == ("bounds",) else 5, 7)
    assert (mean.shape, mean.dtype) == ((), torch.float32)


def test_geometry_holds_meanings_and_absent_axes():
    geometry = check.geometry_of(TOY, cases.draw(TOY, {**CASE, "scoring": None}))
    assert geometry.axis == {"I": 4, "D": 6, "G": 0}
    assert geometry.attr == {"scoring": "none"}
    assert "scoring=none" in str(geometry)
    assert Geometry.from_json(geometry.to_json()) == geometry
    assert check.geometry_of(TOY, cases.draw(TOY, {**CASE, "G": 7, "with": ("groups",)})).axis["G"] == 7


def test_refusals_name_the_argument():
    a = cases.draw(TOY, CASE)
    assert check.validate(TOY, a)["I"] == 4
    with pytest.raises(ArgumentError, match="toy: scoring is 'max'; allowed: 'softmax', 'sigmoid', None"):
        check.validate(TOY, {**a, "scoring": "max"})
    with pytest.raises(ArgumentError, match=r"x has 7 on axis 1 \(2\*I\)"):
        check.validate(TOY, {**a, "x": a["x"][:, :7]})
    with pytest.raises(ArgumentError, match=r"packed has 3 on axis 1 \(I\), other arguments have I = 4"):
        check.validate(TOY, {**a, "packed": a["packed"][:, :3]})
    with pytest.raises(TypeError, match=r"packed has dtype torch.float32; allowed: torch.int8, torch.uint8"):
        check.validate(TOY, {**a, "packed": a["packed"].float()})


def test_every_floating_dtype_is_known():
    assert {*FLOATS, *INTS, *BYTES, "bool"} == set(check.TORCH_DTYPES)
