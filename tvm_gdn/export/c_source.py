"""The compiled operator as C99: what the target ``c`` generates (`targets/c.toml`), freed of TVM's headers.

Runs in a process of its own (`python -m tvm_gdn.export.c_source`), like every compilation. What the generator leaves to do
here: it knows one storage scope, prints vector code that is no C (so loops stay scalar), reads floats through casted pointers
(undefined in C; `memcpy` is not), and includes TVM's headers, of which `PREAMBLE` restates the few structures that are used.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources

from tvm_gdn import build
from tvm_gdn.export.artifact import ExportError, Request
from tvm_gdn.spec import Geometry
from tvm_gdn.target import named

#: What the generic schedules become; `targets/c.toml`.
TARGET = "c"

PREAMBLE = """\
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The generator names more values than an operator's case uses. */
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#endif

/* The calling convention of the generated function: dense arrays with shapes (DLPack), tagged arguments. */
typedef struct { int32_t device_type, device_id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct {
  int32_t type_index;
  uint32_t padding;
  union { int64_t v_int64; double v_float64; void* v_ptr; };
} TVMFFIAny;

static char last_error[2048];

static void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  size_t used = (size_t)snprintf(last_error, sizeof last_error, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof last_error; ++i)
    used += (size_t)snprintf(last_error + used, sizeof last_error - used, "%s", parts[i]);
}
"""
# C11's anonymous union is an extension in C99; naming it keeps strict compilers quiet.
PREAMBLE = PREAMBLE.replace("void* v_ptr; };", "void* v_ptr; } u;")
_BITS = "static inline {type} bits_as_{type}(const void* p) {{ {type} x; memcpy(&x, p, sizeof x); return x; }}"


def _helpers(code: str) -> list[str]:
    """Functions that the code calls, and no others: clang warns of those that nobody calls."""
    return [_BITS.format(type=name) for name in ("float", "int32_t", "uint32_t", "uint16_t") if f"bits_as_{name}(" in code]


def _workspace() -> str:
    """Scratch memory of calls, private to the file: `csrc/workspace.c` without its includes, which `PREAMBLE` has."""
    text = (resources.files("tvm_gdn") / "csrc" / build.WORKSPACE).read_text(encoding="utf-8")
    return re.sub(
        r"^(void\*|int) TVM", r"static \1 TVM", re.sub(r"^#include.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE
    )


def generate(request: Request, timeout: float = 600.0) -> str:
    """C source of a kernel: `PREAMBLE` and ``static int32_t kernel(void* args, int32_t num_args)``.

    Parameters
    ----------
    request : Request
        Any operator on CPU schedules, in fp32 and bf16.
    timeout : float
        Seconds.

    Returns
    -------
    str

    Raises
    ------
    ExportError
        float16, for which C99 has no type; or the generator failed.
    """
    refusal = named("c").refuses(request.geometry.dtype)
    if refusal:
        raise ExportError(f"{request.spec.name}: {refusal}; allowed: float32, bfloat16")
    job = json.dumps({"op": request.spec.name, "geometry": request.geometry.to_json()})
    done = subprocess.run(
        [sys.executable, "-m", "tvm_gdn.export.c_source"],
        input=job, capture_output=True, text=True, timeout=timeout, check=False, env=build.builder_environment(),
    )  # fmt: skip
    if done.returncode:
        raise ExportError(f"{request.spec.name}: TVM's C generator failed:\n{done.stderr[-1500:]}")
    code = plain(json.loads(done.stdout.splitlines()[-1])["source"], request.symbol)
    return "\n".join((PREAMBLE, *_helpers(code), *([_workspace()] if "TVMBackendAllocWorkspace" in code else []), code))


def plain(source: str, symbol: str) -> str:
    """TVM's C source without its headers, linkage macros, and undefined casts."""
    body = source[source.index("TVM_DLL") :]
    body = re.sub(r"#ifdef __cplusplus\nextern \"C\"\n#endif\n", "", body)
    body = re.sub(r"^TVM_DLL [\w ]+\([^{;]*\);\n", "", body, flags=re.MULTILINE)
    body = body[: body.rindex("TVM_DLL int32_t __tvm_ffi_main")]
    body = re.sub(r"^ *#pragma .*\n", "", body, flags=re.MULTILINE)
    body = body.replace(
        f"TVM_DLL int32_t __tvm_ffi_{symbol}(void* self_handle, void* args, int32_t num_args, void* result)",
        "static int32_t kernel(void* args, int32_t num_args)",
    )
    body = re.sub(r"\*\((float|int32_t|uint32_t|uint16_t) \*\)\(&\((\w+)\)\)", r"bits_as_\1(&\2)", body)
    body = re.sub(r"(\)args\)\[\d+\])\.(v_int64|v_float64|v_ptr)", r"\1.u.\2", body)
    body = re.sub(r"\binff\b", "INFINITY", body)
    left = re.search(
        r"TVM_DLL|TVMBackend(?!AllocWorkspace|FreeWorkspace)\w*|\*\((?:float|u?int32_t) \*\)\(&|\b(?:u?int\d+_t|float)\d+\b",
        re.sub(r'"[^"\n]*"', "", body),  # texts of errors name dtypes
    )
    if left:
        raise ExportError(f"{symbol}: the generated C still has {left[0]!r}: TVM, undefined in C99, or vector code of a schedule")
    return body.rstrip() + "\n"


def _lower(op: str, geometry: Geometry) -> str:
    import tvm

    from tvm_gdn.ops import OPS

    target = named(TARGET)
    _, function = build.scheduled(build.Request(OPS[op], geometry), target)
    with tvm.transform.PassContext(opt_level=3, config=dict(target.pass_config)):
        library = tvm.compile(function, target=build.tvm_target(target))
    return str(library.mod.inspect_source())


if __name__ == "__main__":
    _job = json.load(sys.stdin)
    _source = _lower(_job["op"], Geometry.from_json(_job["geometry"]))
    sys.stdout.write("\n" + json.dumps({"source": _source}) + "\n")
