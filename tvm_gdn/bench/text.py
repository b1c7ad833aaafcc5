"""The tables of ``tvm_gdn bench``, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tvm_gdn import parity
from tvm_gdn.bench import machine
from tvm_gdn.commands.text import split_common, table

_PEER_NAMES = {"torch_compile": "torch.compile", "transformers": "transformers", "onnxruntime": "onnxruntime"}

_NOTES = """\
us: median of interleaved rounds (quartiles). kernel: the bare compiled function on outputs that exist. GB/s: the least
bytes that the operator must move (states, data and outputs once) per time. of copy: time of a plain torch copy_ of as
many bytes, half read and half written, over ours; above 100 % means faster than the copy, which needs twice the cache
of an update in place. error: the worst RMS ratio to the float64 reference (its limit). x: how many times faster than
the contender we are, median over the rounds."""
_DEVICE_NOTE = """\
On an accelerator us is the time of a call in a captured graph, and eager the time of a call from Python, launch included."""
_PEER_NOTE = """\
transformers runs on tensors that are prepared before the clock starts (gates, split, slots), and as its users get it,
with the system's default malloc: much of its time at large batches is page faults on fresh result tensors, which a
tuned malloc avoids."""
_CALL_NOTE = """\
overhead: public function minus bare kernel, median over the rounds. operator: torch.ops directly; its difference to the
kernel is torch's dispatcher, the look-up of the kernel and the allocation of the outputs; public minus operator is the
Python signature."""


def render(report: Mapping[str, Any]) -> str:
    """Text of a benchmark report.

    Parameters
    ----------
    report : mapping
        What ``tvm_gdn bench --json`` writes.

    Returns
    -------
    str
    """
    where = f"on {report['device']}" if report.get("device") else f"{report['threads']} threads"
    parts = [f"target {report['target']}, {where}; {machine.line()}; {report['date']}"]
    for op in dict.fromkeys(row["op"] for row in report["cases"]):
        parts.append("\n".join(_operator(op, [row for row in report["cases"] if row["op"] == op])))
    parts.append(_NOTES + (f"\n{_DEVICE_NOTE}" if report.get("device") else "") + (f"\n{_PEER_NOTE}" if report["peers"] else ""))
    if report["calls"]:
        parts.append(_calls(report["calls"]))
    if report["first_call"]:
        parts.append("\n".join(_first_call(report["first_call"])))
    return "\n\n".join(parts)


def line(row: Mapping[str, Any]) -> str:
    """One shape in one line."""
    eager = {name: f" (eager {times['median']:.1f})" for name, times in row["eager_us"].items()}
    times = ", ".join(f"{name} {times['median']:.1f}{eager.get(name, '')}" for name, times in row["us"].items())
    return f"{row['op']} {row['case']}: {times} us" + ("" if row["passed"] else " WRONG or not compiled")


def _operator(op: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    common, labels = split_common([row["case"] for row in rows])
    yield f"{op}  {common}".rstrip()
    others = [name for name in ("reference", *_PEER_NAMES) if any(name in row["us"] for row in rows)]
    eager = any(row["eager_us"] for row in rows)
    header = ["shape", "us", "", "eager" if eager else "kernel", "GB/s", "of copy", "error"]
    for name in others:
        header += [_PEER_NAMES.get(name, name), "x"]
    lines = []
    for row, label in zip(rows, labels, strict=True):
        ours, times = row["us"]["tvm_gdn"], row["us"]
        beside = row["eager_us"].get("tvm_gdn") if eager else times.get("kernel")
        kernel = "-" if beside is None else f"{beside['median']:.1f}"
        line = [
            label,
            f"{ours['median']:.1f}",
            f"({ours['q1']:.1f}-{ours['q3']:.1f})",
            kernel,
            f"{row['gb_per_s']:.1f}",
            "-" if row["share_of_copy"] is None else f"{row['share_of_copy']:.0%}",
            _error(row),
        ]
        for name in others:
            line += [f"{times[name]['median']:.0f}", f"{row['times_faster'][name]:.1f}"] if name in times else ["-", "-"]
        lines.append(line)
    yield table(header, lines, right=(1, 3, 4, 5, *range(7, len(header))))
    for row in rows:
        if not row["passed"]:
            yield f"WRONG or not compiled: {row['case']}: {row['served_by']}"
        for name, note in row["peer_notes"].items():
            yield f"{_PEER_NAMES.get(name, name)} left out at {row['case']}: {note}"
        for name, error in row["peer_errors"].items():
            limit = next(iter(row["limits"].values()))
            if error > limit:
                yield f"{_PEER_NAMES[name]} is less exact at {row['case']}: error {error:.1e}, our limit {limit:.0e}"
    served = dict.fromkeys(row["served_by"] for row in rows)
    yield f"served by: {'; '.join(served)}"


def _error(row: Mapping[str, Any]) -> str:
    worst = max(row["limits"], key=lambda name: parity.share(row["errors"][name], row["limits"][name]))
    return f"{row['errors'][worst]:.1e} ({row['limits'][worst]:.0e})"


def _calls(rows: list[dict[str, Any]]) -> str:
    columns = ("public", "operator", "kernel", "allocation", "overhead")
    lines = [[row["op"], *(f"{row[name]:.2f}" for name in columns)] for row in rows]
    body = table(("cost of a call, us (one token, head and thread; K = V = 8)", *columns), lines, right=range(1, 6))
    return f"{body}\n{_CALL_NOTE}"


def _first_call(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"first call of {found['op']} in a fresh process, from `import tvm_gdn` to the result, inputs included:"
    pack, compiler = found["pack"], found["compiler"]
    taken = f"{pack['from_import_ms']:.1f} ms, of which the call {pack['call_ms']:.1f} ms"
    yield f"  with a pack: {taken}; {pack['served_by']}"
    if compiler is None:
        yield "  without a pack: not measured, apache-tvm is not installed"
        return
    yield f"  without a pack (compiles): {compiler['from_import_ms'] / 1e3:.1f} s; its log:"
    for text in compiler["log"]:
        yield f"    {text}"
