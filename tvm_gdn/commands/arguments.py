"""Command-line arguments that several subcommands share: targets, operators, and what a kernel is compiled for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from tvm_gdn import cases, dispatch, env
from tvm_gdn.check import TORCH_DTYPES, geometry_of
from tvm_gdn.errors import ArgumentError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import INTS, Axis, Geometry, OpSpec, Scalar
from tvm_gdn.target import TargetSpec, resolve, runnable, target_names

#: Keys of --dims that are no axis, attribute or tensor of the operator.
_DIMS_KEYS = {"dtype": "dtype", "state": "state_dtype", "index": "index_dtype"}


def add_target(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Add ``--target``; `also` says what else the subcommand takes."""
    parser.add_argument(
        "--target",
        metavar="NAME",
        default=env.target_name(),
        help=f"auto (the best that this CPU runs; default), or one of: {', '.join(target_names())} (cuda, rocm and musa mean "
        "the device that is present); emulated:NAME runs a device's code on the CPU; or a JSON object with the fields of a "
        f"file in targets/{also}",
    )


def add_op(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--op``, which may be repeated."""
    parser.add_argument("--op", action="append", choices=list(OPS), metavar="OP", help=f"{what}; one of: {', '.join(OPS)}")


def use_target(text: str) -> TargetSpec:
    """Make the calls of this process use one target and nothing else.

    Parameters
    ----------
    text : str
        As `target.resolve` takes it.

    Returns
    -------
    TargetSpec

    Raises
    ------
    TargetError
        It is unknown, or this machine cannot run it.
    """
    target = runnable(resolve(text))
    os.environ["TVM_GDN_TARGET"] = target.name if text == "auto" else text
    dispatch.reset()
    return target


def small_case(spec: OpSpec, case: Mapping[str, Any]) -> dict[str, Any]:
    """The same case with every symbolic axis as small as it gets: the same kernel, next to no data."""
    names = {Axis.parse(axis).name for tensor in spec.tensors for axis in tensor.axes.split()} - {""}
    names |= {name for name in case if name.isupper()}
    small = {name: spec.smallest.get(name, 1) for name in sorted(names - set(spec.static_axes))}
    return {**{name: value for name, value in case.items() if name != "lengths"}, **small}


def geometry_of_case(spec: OpSpec, case: Mapping[str, Any]) -> Geometry:
    """Geometry of a case, found without drawing tensors of its size."""
    return geometry_of(spec, cases.meta(spec, case))


def parse_dims(spec: OpSpec, text: str) -> Geometry:
    """Geometry of a ``--dims`` text such as ``K=128,V=128,dtype=bfloat16,state=float32``.

    Whatever it leaves out is as in the operator's first benchmark shape.

    Raises
    ------
    ArgumentError
        Names the key or value and what is allowed.
    """
    case: dict[str, Any] = dict(spec.bench[0]) if spec.bench else {}
    case["dtypes"] = dict(case.get("dtypes", {}))
    optional = [tensor.name for tensor in spec.tensors if tensor.optional]
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    for part in filter(None, text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ArgumentError(f"--dims {part!r}: write NAME=VALUE, separated by commas")
        if key in spec.static_axes:
            case[key] = _integer(key, value)
        elif key in _DIMS_KEYS:
            case[_DIMS_KEYS[key]] = _dtype(key, value)
        elif key == "with":
            case["with"] = tuple(filter(None, value.split("+")))
            unknown = sorted(set(case["with"]) - set(optional))
            if unknown:
                raise ArgumentError(f"--dims with={value}: {', '.join(unknown)}: allowed for {spec.name}: {', '.join(optional)}")
        elif key in spec.static_attrs:
            case[key] = _attribute(next(scalar for scalar in spec.scalars if scalar.name == key), value)
        elif key in tensors:
            case["dtypes"][key] = _dtype(key, value)
        else:
            known = [*spec.static_axes, *_DIMS_KEYS, "with", *spec.static_attrs, *tensors]
            raise ArgumentError(f"--dims {key}: {spec.name} has {', '.join(known)}")
    _check_data_dtype(spec, case)
    lacking = [axis for axis in spec.static_axes if axis not in case]
    if lacking:
        raise ArgumentError(f"--dims: {spec.name} also needs {', '.join(f'{axis}=SIZE' for axis in lacking)}")
    return checked_geometry(spec, geometry_of_case(spec, case))


def example_dims(spec: OpSpec) -> str:
    """A ``--dims`` text of an operator's first benchmark shape, for messages."""
    case = (spec.bench or spec.cases)[0]
    axes = geometry_of_case(spec, case).axis
    return ",".join([*(f"{axis}={size}" for axis, size in axes.items()), f"dtype={case.get('dtype', 'float32')}"])


def _check_data_dtype(spec: OpSpec, case: Mapping[str, Any]) -> None:
    """Refuse a dtype that no data tensor takes; tensors that have a dtype of their own keep it."""
    data = [tensor for tensor in spec.tensors if not tensor.usual and tensor.dtypes != INTS]
    dtype = case.get("dtype")
    if dtype and data and not any(dtype in tensor.dtypes for tensor in data):
        raise ArgumentError(
            f"--dims dtype={dtype}: {data[0].name}: {dtype!r} is not allowed; allowed: {', '.join(data[0].dtypes)}"
        )


def _attribute(scalar: Scalar, text: str) -> Any:
    if scalar.type != "str":
        number = _integer(scalar.name, text)
        return bool(number) if scalar.type == "bool" else number
    meanings = {str(given): given for given, _ in scalar.choices}
    if text not in meanings:
        raise ArgumentError(f"--dims {scalar.name}={text}: allowed: {', '.join(meanings)}")
    return meanings[text]


def _integer(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ArgumentError(f"--dims {key}={text}: give a whole number (0 or 1 for a switch)")
    return int(text)


def _dtype(key: str, text: str) -> str:
    if text not in TORCH_DTYPES:
        raise ArgumentError(f"--dims {key}={text}: allowed: {', '.join(TORCH_DTYPES)}")
    return text


def parse_geometry(spec: OpSpec, text: str) -> Geometry:
    """Geometry of a ``--geometry`` text: the JSON that an error about a missing kernel prints.

    Raises
    ------
    ArgumentError
        It is no such JSON, or does not fit the operator.
    """
    try:
        geometry = Geometry.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"--geometry: not the JSON of a geometry ({error!r}); copy it from the message that names the missing "
            "kernel, or use --dims"
        ) from error
    return checked_geometry(spec, geometry)


def checked_geometry(spec: OpSpec, geometry: Geometry) -> Geometry:
    """The same geometry, or an error that says in what it does not fit the operator."""
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    wrong = []
    if set(geometry.axis) != set(spec.static_axes) or _too_small(spec, geometry):
        wrong.append(f"axes must be {{{', '.join(spec.static_axes)}}}, each at least 1; got {geometry.axis}")
    if set(geometry.attr) != {*spec.static_attrs, *dict(spec.traits)}:
        wrong.append(f"attrs must be {{{', '.join(spec.static_attrs)}}}; got {geometry.attr}")
    missing = [name for name, tensor in tensors.items() if not tensor.optional and name not in geometry.dtype]
    unknown = sorted(set(geometry.dtype) - set(tensors))
    if missing or unknown:
        wrong.append(f"dtypes: missing {missing}, unknown {unknown}")
    roles: dict[str, str] = {}
    for name, dtype in geometry.dtypes:
        if name not in tensors:
            continue
        if dtype not in tensors[name].dtypes:
            wrong.append(f"{name}: {dtype!r} is not allowed; allowed: {', '.join(tensors[name].dtypes)}")
        elif roles.setdefault(tensors[name].dtype_role, dtype) != dtype:
            role = tensors[name].dtype_role
            wrong.append(f"{name}: {dtype} differs from the other tensors of the role {role!r}, which are {roles[role]}")
    if wrong:
        raise ArgumentError(f"{spec.name} has no such geometry: {'; '.join(wrong)}")
    return geometry


def _too_small(spec: OpSpec, geometry: Geometry) -> bool:
    """Whether an axis of a tensor that is present is below 1; an axis that only absent tensors have is 0."""
    present = [tensor for tensor in spec.tensors if tensor.name in geometry.dtype]
    given = {**geometry.attr, **dict.fromkeys(geometry.dtype, True)}
    used = {Axis.parse(axis).name for tensor in present for axis in tensor.axis_names(given)}
    return any(size < (axis in used) for axis, size in geometry.axes)
