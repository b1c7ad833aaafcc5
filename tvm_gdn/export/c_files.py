"""Format ``c``: a C99 library with a plain entry point, a self-test that carries its vectors, and a CMake file.

The entry point takes dense arrays and their sizes; it is written from the SPEC alone, so a new operator needs nothing here.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tvm_gdn import parity
from tvm_gdn.build import COMPILERS
from tvm_gdn.export import c_source
from tvm_gdn.export.artifact import Check, Request, draw
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Axis, OpSpec, Output, Scalar, Tensor

C_TYPES = {
    "float32": "float", "bfloat16": "uint16_t", "int32": "int32_t", "int64": "int64_t", "int8": "int8_t", "uint8": "uint8_t",
    "bool": "uint8_t",
}  # fmt: skip
#: DLPack's type codes and bits.
_CODES = {
    "float32": (2, 32), "bfloat16": (4, 16), "int32": (0, 32), "int64": (0, 64), "int8": (0, 8), "uint8": (1, 8), "bool": (6, 8),
}  # fmt: skip
_SCALARS = {"float": ("float", 3, "v_float64"), "int": ("int64_t", 1, "v_int64"), "bool": ("int", 1, "v_int64")}
#: Values of one expected output that a self-test carries at most, evenly picked.
_SAMPLES = 16384
#: Values of one input that it carries at most: a larger input repeats its first ones, of a period that no size is a multiple of.
_PERIOD = 32749
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2")

Argument = Tensor | Scalar | Output


class Interface:
    """The C entry point of one kernel: its arguments in the order of the kernel, and the sizes that they share."""

    def __init__(self, request: Request) -> None:
        spec, geometry = request.spec, request.geometry
        self.request, attrs = request, geometry.attr
        self.arguments: list[Argument] = [
            arg for arg in spec.inputs
            if (isinstance(arg, Tensor) and arg.name in geometry.dtype)
            or (isinstance(arg, Scalar) and arg.passed and not arg.static)
        ]  # fmt: skip
        self.arguments += [output for output in spec.outputs if not output.when or attrs.get(output.when)]
        given = {**attrs, **dict.fromkeys(geometry.dtype, True)}
        self.axes = {a.name: [Axis.parse(x) for x in a.axis_names(given)] for a in self.arguments if not isinstance(a, Scalar)}
        known = {*geometry.axis, *(arg.name for arg in self.arguments), ""}
        self.sizes = list(dict.fromkeys(x.name for axes in self.axes.values() for x in axes if x.name not in known))

    def dtype(self, arg: Tensor | Output) -> str:
        """Storage dtype of a tensor."""
        dtypes = self.request.geometry.dtype
        if isinstance(arg, Tensor):
            return dtypes[arg.name]
        if arg.like in C_TYPES:
            return arg.like
        role = [t.name for t in self.request.spec.tensors if t.dtype_role == arg.like and t.name in dtypes]
        return dtypes[role[0]] if role else arg.fallback

    def size(self, axis: Axis) -> str:
        """C expression of an axis: numbers compiled in, and size arguments."""
        if not axis.name:
            return str(axis.plus)
        text = axis.expression(str(self.request.geometry.axis.get(axis.name, axis.name))).replace("//", "/")
        return text if text.isidentifier() or text.isdecimal() else f"({text})"

    def parameters(self) -> Iterator[str]:
        """C parameters: tensors and scalars as the operator has them, then the sizes."""
        for arg in self.arguments:
            if isinstance(arg, Scalar):
                yield f"{_SCALARS[arg.type][0]} {arg.name}"
            else:
                const = "" if isinstance(arg, Output) or arg.mutated else "const "
                yield f"{const}{C_TYPES[self.dtype(arg)]}* {arg.name}"
        yield from (f"int64_t {name}" for name in self.sizes)

    def prototype(self) -> str:
        """The entry point's declaration without a semicolon."""
        return f"int {self.request.symbol}({', '.join(self.parameters())})"


def build(request: Request) -> dict[str, bytes]:
    """Files of the library.

    Parameters
    ----------
    request : Request
        Kernel in fp32 or bf16.

    Returns
    -------
    dict
        ``<symbol>.c``, ``<symbol>.h``, ``<symbol>_test.c`` and ``CMakeLists.txt``.

    Raises
    ------
    ExportError
        The kernel has no portable C.
    """
    interface, symbol = Interface(request), request.symbol
    files = {
        f"{symbol}.c": f'#include "{symbol}.h"\n\n{c_source.generate(request)}\n{_entry(interface)}',
        f"{symbol}.h": _header(interface),
        f"{symbol}_test.c": _test(interface),
        "CMakeLists.txt": _cmake(symbol),
    }
    return {name: text.encode() for name, text in files.items()}


def serves(spec: OpSpec) -> tuple[str, ...]:
    """Dtypes of an operator in C99, which has no float16; a layer has no C."""
    return tuple(dtype for dtype in C_TYPES if spec.name in OPS)


def verify(request: Request, folder: Path) -> list[Check]:
    """Compile with warnings as errors and run the self-test, with every C compiler found; the same through CMake."""
    compilers = [path for path in map(shutil.which, ("gcc", "clang")) if path] or [path for path in [shutil.which("cc")] if path]
    what = "C99 build without warnings, self-test against float64 reference"
    if not compilers:
        return [Check(what, "C compiler", False, f"none found ({', '.join(COMPILERS)})")]
    checks = [_self_test(what, compiler, request.symbol, folder) for compiler in compilers]
    return [*checks, _cmake_test(folder)] if all(check.passed for check in checks) else checks


def _self_test(what: str, compiler: str, symbol: str, folder: Path) -> Check:
    program, by = folder / "verify", Path(compiler).name
    sources = [str(folder / f"{symbol}.c"), str(folder / f"{symbol}_test.c")]
    done = subprocess.run([compiler, *STRICT, *sources, "-o", str(program), "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line[:300] for line in done.stderr.splitlines() if "error" in line]
        return Check(what, by, False, "; ".join(errors[:3]) or done.stderr[-300:])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    program.unlink()
    return Check(what, by, done.returncode == 0, done.stdout.strip().replace("\n", "; ") or done.stderr)


def _cmake_test(folder: Path) -> Check:
    """Configure, build, and run ctest, in a folder of its own that is removed."""
    what, by, build_folder = "CMakeLists.txt: build, ctest", "cmake", folder / "cmake-build"
    if shutil.which("cmake") is None:
        return Check(what, by, None, "not installed")
    steps = (
        ["cmake", "-S", str(folder), "-B", str(build_folder), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build_folder)],
        ["ctest", "--test-dir", str(build_folder)],
    )
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False, timeout=600)
            if done.returncode:
                return Check(what, by, False, f"{step[0]} {step[1]}: {(done.stderr or done.stdout).strip()[-300:]}")
    finally:
        shutil.rmtree(build_folder, ignore_errors=True)
    return Check(what, by, True)


def _header(interface: Interface) -> str:
    request = interface.request
    lines = []
    for arg in interface.arguments:
        if isinstance(arg, Scalar):
            lines.append(f"   {arg.name}: {arg.type}")
            continue
        shape = ", ".join(interface.size(axis).strip("()") for axis in interface.axes[arg.name])
        note = "written" if isinstance(arg, Output) else "updated in place" if arg.mutated else "read"
        kind = interface.dtype(arg)
        lines.append(f"   {arg.name}: [{shape}] {kind}{' (its bits)' if kind == 'bfloat16' else ''}, {note}")
    guard = request.symbol.upper() + "_H"
    return f"""\
/* {request.spec.name}: {request.spec.summary}.

   Exported by tvm_gdn for: {request.geometry}. Apache-2.0.
   Arrays are dense, the last axis fastest; the names are those of the Python function, whose documentation holds.

{chr(10).join(lines)}
   {", ".join(interface.sizes)}: sizes

   Returns 0, or -1 where an argument is not allowed; {request.symbol}_error() then says which (one text per process,
   valid until the next call; calls that fail at the same time in several threads may mix their texts). At most a few bytes
   per sequence are allocated, for checks; calls on different outputs may run in parallel. */
#ifndef {guard}
#define {guard}
#include <stdint.h>
#ifdef __cplusplus
extern "C" {{
#endif
{interface.prototype()};
const char* {request.symbol}_error(void);
#ifdef __cplusplus
}}
#endif
#endif
"""


def _entry(interface: Interface) -> str:
    symbol, lines, count = interface.request.symbol, [], len(interface.arguments)
    for i, arg in enumerate(interface.arguments):
        if isinstance(arg, Scalar):
            _, tag, field = _SCALARS[arg.type]
            lines.append(f"  args[{i}].type_index = {tag}; args[{i}].u.{field} = {arg.name};")
            continue
        axes = interface.axes[arg.name]
        code, bits = _CODES[interface.dtype(arg)]
        lines += [
            f"  int64_t shape{i}[] = {{{', '.join(interface.size(axis) for axis in axes) or '1'}}};",
            f"  DLTensor tensor{i} = {{(void*){arg.name}, {{1, 0}}, {len(axes)}, {{{code}, {bits}, 1}}, shape{i}, NULL, 0}};",
            f"  args[{i}].type_index = 7; args[{i}].u.v_ptr = &tensor{i};",
        ]
    body = "\n".join(lines)
    return f"""\
{interface.prototype()} {{
  TVMFFIAny args[{count}];
  memset(args, 0, sizeof args);
{body}
  return (int)kernel(args, {count});
}}

const char* {symbol}_error(void) {{ return last_error; }}
"""


def _test(interface: Interface) -> str:
    """A program that calls the entry point on drawn inputs and compares with the float64 reference's outputs."""
    request, symbol = interface.request, interface.request.symbol
    arguments, want = draw(request, **_test_sizes(request))
    large = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel() > _PERIOD]
    if large:
        arguments |= {name: _repeated(arguments[name]) for name in large}
        want = parity.expected(request.spec, arguments)
    sizes: dict[str, int] = {}
    data, call, compares, fills = [], [], [], []
    for arg in interface.arguments:
        if isinstance(arg, Scalar):
            call.append(_scalar(request, arg, arguments[arg.name]))
            continue
        kind, name = interface.dtype(arg), arg.name
        value, expected = arguments.get(name), want.get(name)
        shape = (value if value is not None else want[name]).shape
        for axis, extent in zip(interface.axes[name], shape, strict=True):
            sizes[axis.name] = axis.named(extent) or 0
        call.append(name)
        if value is None or bool(value.isnan().all() if value.is_floating_point() else False):
            # Outputs, and buffers that a call fills: NaN, so that what is not written shows.
            data.append(f"static {C_TYPES[kind]} {name}[{max(1, shape.numel())}];")
            fills.append(f"  memset({name}, 0xff, sizeof {name});\n")
        elif name in large:
            period = _numbers(value.flatten()[:_PERIOD])
            data.append(f"static const {C_TYPES[kind]} some_{name}[] = {{{period}}};")
            data.append(f"static {C_TYPES[kind]} {name}[{value.numel()}];")
            fills.append(f"  for (size_t i = 0; i < {value.numel()}; ++i) {name}[i] = some_{name}[i % {_PERIOD}];\n")
        else:
            data.append(f"static {C_TYPES[kind]} {name}[] = {{{_numbers(value)}}};")
        if expected is not None:
            step = max(1, expected.numel() // _SAMPLES) | 1
            data.append(f"static const double want_{name}[] = {{{_numbers(expected.double().flatten()[::step])}}};")
            read = f"bf16(got[i * {step}])" if kind == "bfloat16" else f"(double)got[i * {step}]"
            limit = parity.limit(request.spec, name, getattr(torch, kind))
            compares.append(_COMPARE.format(name=name, type=C_TYPES[kind], read=read, limit=limit))
    call += [str(sizes[name]) for name in interface.sizes]
    return _TEST.format(
        symbol=symbol, op=request.spec.name, data="\n".join(data), fills="".join(fills), call=", ".join(call),
        compares="".join(compares), bf16=_BF16 if any("bf16(" in text for text in compares) else "",
    )  # fmt: skip


def _repeated(x: torch.Tensor) -> torch.Tensor:
    """The first values again and again."""
    flat = x.flatten()
    return flat[torch.arange(flat.numel()) % _PERIOD].view(x.shape)


def _test_sizes(request: Request) -> dict[str, Any]:
    axes = request.geometry.axis
    # State vectors make up the file: one sequence where states are large.
    many = axes.get("K", 1) * axes.get("V", 1) <= 64 * 64
    tokens = 3 if "intermediate_states_buffer" in request.geometry.dtype else 19
    sizes = {"B": 2 if many else 1, "T": tokens, "H": 1, "HV": 2, "S": 4, "M": 5, "D": 6, "G": 3, "E": 8, "k": 2}
    if axes.get("D", 1) * axes.get("I", 16 * axes.get("G", 1)) > 2**20:
        sizes["E"] = 2  # the reference computes in float64, and a test program should fit into small machines
    return sizes


def _scalar(request: Request, arg: Scalar, value: Any) -> str:
    if value is None:
        value = arg.resolve(request.geometry.axis) if arg.resolve is not None else 0
    return str(int(value)) if arg.type in {"bool", "int"} else repr(float(value))


def _numbers(value: torch.Tensor) -> str:
    flat = value.detach().contiguous().flatten()
    if flat.dtype == torch.bfloat16:
        texts = [str(x & 0xFFFF) for x in flat.view(torch.int16).tolist()]
    elif flat.is_floating_point():
        texts = ["NAN" if x != x else f"{x:.9g}" for x in flat.tolist()]  # noqa: PLR0124
    else:
        texts = [str(int(x)) for x in flat.tolist()]
    return ",".join(texts or ["0"])


def _cmake(symbol: str) -> str:
    return f"""\
cmake_minimum_required(VERSION 3.10)
project({symbol} C)
set(CMAKE_C_STANDARD 99)
add_library({symbol} {symbol}.c)
target_include_directories({symbol} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})
if(UNIX)
  target_link_libraries({symbol} PUBLIC m)
endif()
enable_testing()
add_executable({symbol}_test {symbol}_test.c)
target_link_libraries({symbol}_test {symbol})
add_test(NAME {symbol} COMMAND {symbol}_test)
"""


_BF16 = """\
static double bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return (double)y;
}
"""

_COMPARE = """\
  {{
    const {type}* got = {name};
    const size_t n = sizeof want_{name} / sizeof want_{name}[0];
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; ++i) {{
      const double want = want_{name}[i], value = {read};
      if (isnan(want) && isnan(value)) continue;
      error += (value - want) * (value - want);
      norm += want * want;
    }}
    const double ratio = norm > 0 ? sqrt(error / norm) : sqrt(error);
    const int ok = ratio <= {limit};
    printf("{name} %.1e (limit {limit:.0e})%s\\n", ratio, ok ? "" : " FAILED");
    failures += !ok;
  }}
"""

_TEST = """\
/* Self-test of {op}: drawn inputs, and the outputs of a float64 reference. Exit status 0: all within tolerance. */
#include "{symbol}.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

{data}

{bf16}
int main(void) {{
  int failures = 0;
{fills}  if ({symbol}({call}) != 0) {{
    printf("refused: %s\\n", {symbol}_error());
    return 2;
  }}
{compares}  return failures != 0;
}}
"""
