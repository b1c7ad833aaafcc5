"""Export of operators for programs without torch and for vendors' compilers: C99, ONNX, torch programs, GPU sources.

A format is one module with ``build(request)`` (files by name) and ``verify(request, folder)`` (what was run on them, by whom,
with which result); `formats.py` lists them, `command.py` is ``tvm_gdn export``. Nothing is written before everything passed.
"""
