"""TVMScript without its most expensive question: how macros find their parser, without reading every caller's source file.

A macro finds the parser that runs it by a global of some caller. TVM 0.27 asks `inspect.getouterframes`, which also looks up the
lines of code of every frame: two thirds of the time that parsing a kernel takes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_macros() -> Iterator[None]:
    """Let macros find their parser by walking the frames, while kernels are parsed."""
    from tvm.script.parser.core.parser import ScriptMacro

    name, before = ScriptMacro.parser_object_name, ScriptMacro._find_parser_def

    def find(macro: Any) -> Any:
        frame = inspect.currentframe()
        while frame is not None:
            parser = frame.f_globals.get(name)
            if parser is not None:
                return parser
            frame = frame.f_back
        return before(macro)  # which says what is wrong

    ScriptMacro._find_parser_def = find
    try:
        yield
    finally:
        ScriptMacro._find_parser_def = before
