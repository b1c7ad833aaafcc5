"""Compiled operators for hybrid language models, written once in TVM TensorIR.

Importing the package registers ``torch.ops.tvm_gdn.*`` and imports neither tvm nor a compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# In a checkout that is not installed, `schedules` and `targets` lie beside this folder; setuptools maps them into it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "targets" / "native.toml").is_file() and (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether this process is the command ``tvm_gdn`` or ``python -m tvm_gdn``."""
    as_module = sys.argv[:1] == ["-m"] and ["-m", "tvm_gdn"] in (sys.orig_argv[i : i + 2] for i in range(len(sys.orig_argv)))
    return as_module or Path(next(iter(sys.argv), "")).name == "tvm_gdn"


def load_api() -> None:
    """Make the public functions and ``torch.ops.tvm_gdn.*`` available; everywhere but in the command line they are already."""
    api = import_module("tvm_gdn.api")
    globals().update({name: getattr(api, name) for name in api.__all__})


# The command line answers --help and --version without waiting for torch; it calls `load_api` once it has work to do.
if not _is_command_line():
    from tvm_gdn.api import *  # noqa: F403
    from tvm_gdn.api import __all__ as __all__
