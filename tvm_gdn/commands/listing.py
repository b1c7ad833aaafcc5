"""``tvm_gdn list``: which schedule every operator gets on every target, and which packs calls would use."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tvm_gdn import dispatch, schedule
from tvm_gdn.commands import arguments
from tvm_gdn.commands.text import as_json, counted, emit, table
from tvm_gdn.digest import version_of
from tvm_gdn.errors import TargetError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import OpSpec
from tvm_gdn.target import TargetSpec, named, resolve, target_names

_WORDS = """\
tuned    knobs that `tvm_gdn tune` measured as the fastest; tuned*: on some of the column's targets, default on the others
default  a schedule shaped by hand for the target or one that it inherits from; `tvm_gdn tune` may find faster knobs
generic  the portable fallback: right, but slow; the target has no schedule of its own for this operator
none     no schedule yet: calls on the target raise, or under auto run the torch reference and say so
A device's schedule may still refuse a geometry for its shared memory when it is built, and says so then; of the chunked rules
the token recurrence serves what is refused ("recurrent default" in `tvm_gdn build`, a pack's manifest and the log)
(not here) marks a target that this machine cannot run; the table of targets says what it lacks, `tvm_gdn doctor` all of it
`tvm_gdn list --op OP` says why an operator has these schedules, `--json` all of it"""


#: Words for schedules, the best first: an operator has the best of its geometries' in its cell, the reason tells the rest.
_ORDER = ("tuned", "default", "generic", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    arguments.add_op(parser, "list this operator only, and say why it has its schedules; may be repeated")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    found = collect(args.op or list(OPS))
    emit(as_json(found) if args.json else _text(found, reasoned=bool(args.op)))
    return 0


def collect(ops: list[str]) -> dict[str, Any]:
    """What the listing shows, ready for JSON.

    Parameters
    ----------
    ops : list of str
        Operator names.

    Returns
    -------
    dict
        ``auto`` (the target that it means here), ``targets``, ``schedules`` (one entry per operator and target; None
        without apache-tvm, which schedules are written in), ``pack_folders``, ``packs`` and ``refused_packs``.
    """
    targets = [named(name) for name in target_names()]
    schedules = None
    if version_of("apache-tvm") != "none":
        schedules = [_schedule_of(OPS[op], target) for op in ops for target in targets]
    usable, refused = dispatch.usable_packs()
    return {
        "auto": _auto(),
        "targets": [_target(target) for target in targets],
        "schedules": schedules,
        "pack_folders": [str(folder) for folder in dispatch.pack_folders()],
        "packs": [
            {
                "folder": str(pack.folder), "target": pack.manifest.target, "kernels": len(pack.manifest.kernels),
                "ops": dict(Counter(entry.op for entry in pack.manifest.kernels)),
            }
            for pack in usable
        ],
        "refused_packs": refused,
    }  # fmt: skip


def _auto() -> str | None:
    try:
        return resolve("auto").name
    except TvmGdnError:
        return None


def _target(target: TargetSpec) -> dict[str, Any]:
    missing = target.missing()
    if missing:
        reason = f"not runnable here: this machine lacks {', '.join(missing)}"
    elif not target.rank:
        reason = "runnable here when named; auto never takes it"
    else:
        reason = "runnable here"
    return {
        "name": target.name, "description": target.description, "device": target.device,
        "lineage": list(target.lineage), "runnable": not missing, "missing": missing, "reason": reason,
    }  # fmt: skip


def _schedule_of(spec: OpSpec, target: TargetSpec) -> dict[str, Any]:
    """Where an operator's schedule comes from, over its benchmark shapes (or parity shapes): records are per geometry."""
    geometries = {key.key: key for key in (arguments.geometry_of_case(spec, case) for case in spec.bench or spec.cases)}
    origins: Counter[str] = Counter()
    refused = ""
    for geometry in geometries.values():
        try:
            origins[schedule.origin(spec, geometry, target)[0]] += 1
        except TargetError as error:
            origins["none"] += 1
            refused = str(error)
    tuned, total, none = origins["tuned"], sum(origins.values()), origins["none"]
    space = "" if none == total else schedule.find_space(spec.algorithm, target)[1]
    if none:
        reason = refused if none == total else f"{none} of {total} benchmark geometries: {refused}"
    elif space.startswith(schedule.GENERIC):
        reason = f"the portable schedule ({space}); no schedule of {spec.algorithm!r} for {' or '.join(target.lineage)}"
    elif tuned == total:
        reason = f"schedule of {space}, tuned for all {total} benchmark geometries"
    else:
        reason = f"schedule of {space}; tuned records for {tuned} of {total} benchmark geometries"
    return {
        "op": spec.name, "target": target.name, "word": "tuned" if tuned else min(origins, key=_ORDER.index), "tuned": tuned,
        "geometries": total, "space": space, "runnable": not target.missing(), "missing": target.missing(),
        "reason": reason,
    }  # fmt: skip


def _text(found: dict[str, Any], *, reasoned: bool) -> str:
    parts = []
    if found["schedules"] is None:
        parts.append("apache-tvm is not installed, so schedules cannot be listed (pip install 'tvm_gdn[compile]'); packs run.")
    else:
        parts.append(_schedules_text(found, reasoned=reasoned))
    parts.append(f"auto means {found['auto']} on this machine" if found["auto"] else "auto finds no target that fits this CPU")
    rows = [(target["name"], target["device"], _runs(target), target["description"]) for target in found["targets"]]
    parts.append(table(("target", "device", "runs here", ""), rows))
    parts.append(_packs_text(found))
    return "\n\n".join(parts)


def _runs(target: dict[str, Any]) -> str:
    """Whether a target runs here, in few words; its reason has all of them."""
    missing = target["missing"]
    if not missing:
        return "yes" if target["reason"] == "runnable here" else "when named"
    return f"lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")


def _schedules_text(found: dict[str, Any], *, reasoned: bool) -> str:
    """A column for all targets that differ at most in tuned records; with the reasons if asked for."""
    words: dict[str, dict[str, str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in found["schedules"]:
        word = entry["word"]
        if word == "tuned" and entry["tuned"] < entry["geometries"]:
            word += f" {entry['tuned']}/{entry['geometries']}"
        words.setdefault(entry["op"], {})[entry["target"]] = word
        reasons.setdefault((entry["op"], entry["reason"]), []).append(entry["target"])
    columns: dict[tuple[Any, ...], list[str]] = {}
    for target in found["targets"]:
        name = target["name"]
        usual = ("default" if row[name].startswith("tuned") else row[name] for row in words.values())
        columns.setdefault((target["runnable"], *usual), []).append(name)
    titles = {names[0]: names[0] if len(names) == 1 else f"{names[0]} +{len(names) - 1}" for names in columns.values()}
    rows = [[op, *(_cell({row[name] for name in names}) for names in columns.values())] for op, row in words.items()]
    legend = [
        f"  {titles[names[0]]}: {', '.join(names)}{'' if key[0] else ' (not here)'}"
        for key, names in columns.items()
        if len(names) > 1 or not key[0]
    ]
    every = [target["name"] for target in found["targets"]]
    why = [
        f"  {op} on {'every target' if targets == every else ', '.join(targets)}: {reason}"
        for (op, reason), targets in reasons.items()
    ]
    lines = [table(("operator", *titles.values()), rows), "", *legend, "", _WORDS]
    return "\n".join([*lines, "", "why:", *why] if reasoned else lines)


def _cell(found: set[str]) -> str:
    """What a column says of an operator, by what its targets say."""
    return found.pop() if len(found) == 1 else "tuned*"


def _packs_text(found: dict[str, Any]) -> str:
    lines = [f"packs are looked for in {', '.join(found['pack_folders'])}"]
    for pack in found["packs"]:
        ops = ", ".join(f"{op} {count}" for op, count in pack["ops"].items())
        lines.append(f"  {pack['folder']}: {pack['target']}, {counted(pack['kernels'], 'kernel')} ({ops})")
    lines += [f"  not used: {reason}" for reason in found["refused_packs"]]
    if not found["packs"] and not found["refused_packs"]:
        lines.append("  none; kernels are compiled at the first call. Build one with: tvm_gdn build --model qwen3-next")
    return "\n".join(lines)
