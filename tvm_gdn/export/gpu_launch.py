"""How kernels of an exported source are launched: read out of the host part, written as JSON, and run from it in emulation.

Expressions of the description are plain: numbers, ``+ - * // %``, comparisons, ``and``, ``or``, ``not``, ``min``, ``max`` and
``a if c else b`` over the scalar arguments and over the names of sizes and strides that ``tensors`` introduces. They are
Python's, and C's but for ``//`` (of numbers that are not negative), the words and the conditional.
"""

from __future__ import annotations

import ast
import ctypes
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tvm_gdn.export.artifact import ExportError

_CTYPES = {
    "int64": ctypes.c_int64, "int32": ctypes.c_int32, "uint32": ctypes.c_uint32, "float32": ctypes.c_float, "bool": ctypes.c_bool,
}  # fmt: skip
_TAGS = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z", "tirx.use_dyn_shared_memory")
_FUNCTIONS = {"min": min, "max": max}
_SIMPLE = {"T.min": "min", "T.max": "max"}
_BINARY: dict[str, type[ast.operator]] = {
    "T.Div": ast.FloorDiv, "T.truncdiv": ast.FloorDiv, "T.floordiv": ast.FloorDiv, "T.truncmod": ast.Mod, "T.floormod": ast.Mod,
}  # fmt: skip


class _Plain(ast.NodeTransformer):
    """An expression of the host part without TVM's spelling and without names of intermediate values."""

    def __init__(self, known: Mapping[str, ast.expr]) -> None:
        self.known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put in what a name stands for."""
        return self.known.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Casts fall away: sizes are small and not negative."""
        name, args = ast.unparse(node.func), [self.visit(arg) for arg in node.args]
        if re.fullmatch(r"T\.(u?int\d+|bool)", name):
            return args[0]
        if name == "T.Cast":
            return args[1]
        if name in _BINARY:
            return ast.BinOp(args[0], _BINARY[name](), args[1])
        if name in {"T.if_then_else", "T.Select"}:
            return ast.IfExp(args[0], args[1], args[2])
        if name in _SIMPLE:
            return ast.Call(ast.Name(_SIMPLE[name]), args, [])
        raise ExportError(f"the launch needs {name}, which a description cannot say")


def description(host: str, device: Any) -> dict[str, Any]:
    """Tensors, scratch buffers and kernels of a host part.

    Parameters
    ----------
    host : str
        Its script.
    device : tvm.IRModule
        The device part, for the kernels' parameters.

    Returns
    -------
    dict
        ``tensors``: shapes and strides by argument; ``arguments``: the order of the operator's arguments; ``workspaces``: device
        memory that the caller allocates, in elements; ``kernels``: in the order in which they run, each with the values of its
        parameters and its ``launch`` dimensions; one that does not run has no blocks.
    """
    tensors: dict[str, Any] = {}
    workspaces: dict[str, Any] = {}
    known: dict[str, ast.expr] = {}
    buffers: dict[str, str] = {}
    for line in (line.strip() for line in host.splitlines()):
        if found := re.match(r"(\w+) = T\.Buffer\((.*)\)$", line):
            tensors[found[1]] = _buffer(found[2], known)
        elif found := re.match(r"(\w+) = T\.decl_buffer\((.*)\)$", line):
            source = re.search(r"data=(?:T\.reinterpret\(.*tvm_struct_get\((\w+)_handle, 0, 1,|(\w+)(?:\.data)?[,)])", found[2])
            if source:
                buffers[found[1]] = source[1] or buffers.get(source[2], source[2])
        elif found := re.match(r"(\w+): T\.let\[[^=]*\] = (\w+)\.data$", line):
            buffers[found[1]] = buffers.get(found[2], found[2])
        elif found := re.match(r"(\w+) = T\.alloc_buffer\((.*)\)$", line):
            made = _buffer(found[2], known)
            workspaces[found[1]] = {"elements": " * ".join(f"({x})" for x in made["shape"]), "dtype": made["dtype"]}
        elif (found := re.match(r"(\w+): T\.let\[[^=]*\] = (.*)$", line)) and "tvm_struct_get" not in line:
            known[found[1]] = _Plain(known).visit(ast.parse(found[2], mode="eval").body)
    kernels = []
    for function in device.functions.values():
        name = str(function.attrs["global_symbol"])
        call = next((m for m in re.finditer(r"call_ffi_kernel\((.*), launch_params=", host) if _first(m[1]) == name), None)
        if call is None:
            raise ExportError(f"no launch of {name} in the generated host code")
        values = ast.parse(f"f({call[1]})", mode="eval").body
        assert isinstance(values, ast.Call)
        texts = [_value(value, known, buffers) for value in values.args[1:]]
        conditions = [_text(_Plain(known).visit(ast.parse(text, mode="eval").body)) for text in _enclosing(host[: call.start()])]
        tags = [str(tag) for tag in function.attrs["tirx.kernel_launch_params"]]
        count = len(function.params)
        arguments = [
            {"name": parameter.name, "type": str(parameter.ty).removeprefix("T."), "value": value}
            for parameter, value in zip(function.params, texts[:count], strict=True)
        ]
        launch = dict(zip(tags, texts[count:], strict=True))
        if conditions:
            launch[_TAGS[0]] = f"({launch[_TAGS[0]]}) if {' and '.join(f'({text})' for text in conditions)} else 0"
        kernels.append((call.start(), {"name": name, "arguments": arguments, "launch": launch}))
    order = re.findall(r"(\w+)_type_index: T\.let", host)
    ordered = [kernel for _, kernel in sorted(kernels, key=lambda pair: pair[0])]
    return {"arguments": order, "tensors": tensors, "workspaces": workspaces, "kernels": ordered}


def _enclosing(before: str) -> list[str]:
    """Conditions under which the line behind some text runs."""
    open_: list[tuple[int, str]] = []
    for line in before.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        closed = [condition for at, condition in open_ if at >= indent]
        open_ = [pair for pair in open_ if pair[0] < indent]
        if found := re.match(r"if (.*):$", text):
            open_.append((indent, found[1]))
        elif text == "else:" and closed:
            open_.append((indent, f"not ({closed[0]})"))
    # The last line is the beginning of the one that is asked for.
    return [condition for _, condition in open_]


def _first(text: str) -> str:
    return text.split(",", 1)[0].strip('" ')


def _value(node: ast.expr, known: Mapping[str, ast.expr], buffers: Mapping[str, str]) -> str:
    text = ast.unparse(node)
    if text.endswith(".data"):
        name = text.removesuffix(".data")
        return buffers.get(name, name)
    return _text(_Plain(known).visit(node))


def _text(node: ast.expr) -> str:
    return ast.unparse(ast.fix_missing_locations(node))


def _buffer(text: str, known: Mapping[str, ast.expr]) -> dict[str, Any]:
    """Shape, dtype and strides of the arguments of a buffer's declaration."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)

    def plain(node: ast.expr) -> list[str]:
        assert isinstance(node, ast.Tuple)
        return [_text(_Plain(known).visit(part)) for part in node.elts]

    dtype = str(ast.literal_eval(call.args[1])) if len(call.args) > 1 else "float32"
    strides = next((word.value for word in call.keywords if word.arg == "strides"), None)
    return {"shape": plain(call.args[0]), "dtype": dtype} | ({} if strides is None else {"strides": plain(strides)})


def launcher(library: Path, found: Mapping[str, Any]) -> Callable[..., None]:
    """A function of the operator's arguments, in their order, that launches an emulated source's kernels as a description says.

    It knows nothing but the description and the library: what a user has.
    """
    emulated = ctypes.CDLL(str(library))

    def call(*args: Any) -> None:
        given, names = named(found, args)
        memory = {name: value.data_ptr() for name, value in given.items() if isinstance(value, torch.Tensor)}
        scratch = {name: torch.full((number(one["elements"], names) * 8 + 64,), 0xFF, dtype=torch.uint8)
                   for name, one in found["workspaces"].items()}  # fmt: skip
        memory |= {name: -(-value.data_ptr() // 64) * 64 for name, value in scratch.items()}
        for kernel in found["kernels"]:
            _launch(emulated, kernel, names, memory)

    return call


def named(found: Mapping[str, Any], args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a call by name, and the numbers that a description's expressions are made of."""
    given = dict(zip(found["arguments"], args, strict=True))
    names: dict[str, Any] = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}
    for name, tensor in found["tensors"].items():
        for texts, numbers in ((tensor["shape"], given[name].shape), (tensor.get("strides", ()), given[name].stride())):
            names |= {text: size for text, size in zip(texts, numbers, strict=bool(texts)) if text.isidentifier()}
    return given, names


def _launch(emulated: Any, kernel: Mapping[str, Any], names: Mapping[str, Any], memory: Mapping[str, int]) -> None:
    values: list[Any] = [
        ctypes.c_void_p(memory[one["value"]]) if one["type"].startswith("handle")
        else _CTYPES[one["type"]](number(one["value"], names))
        for one in kernel["arguments"]
    ]  # fmt: skip
    sizes = {tag: number(text, names) for tag, text in kernel["launch"].items()}
    grid = [sizes.get(tag, 0 if tag == _TAGS[-1] else 1) for tag in _TAGS]
    if not math.prod(grid[:3]):
        return
    function, pointers = ctypes.c_void_p(), (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    if emulated.emuModuleGetFunction(ctypes.byref(function), None, kernel["name"].encode()):
        raise ExportError(f"the source has no kernel {kernel['name']}")
    if emulated.emuLaunchKernel(function, *map(ctypes.c_uint, grid), None, pointers, None):
        raise ExportError(f"{kernel['name']}: the launch failed")


def number(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression of a description."""
    return eval(text, {"__builtins__": {}, **_FUNCTIONS}, dict(names))  # noqa: S307
