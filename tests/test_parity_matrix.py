"""The matrix of operators and targets: outcomes land one by one, go on where they ended, and come together from several machines."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment

from tvm_gdn import cli, env, kernel_cache, parity
from tvm_gdn.cases import label
from tvm_gdn.commands import aot, parity_matrix, parity_record
from tvm_gdn.commands import parity as command
from tvm_gdn.errors import ArgumentError, BuildError
from tvm_gdn.ops import OPS
from tvm_gdn.target import emulation_of, named

ROOT = Path(__file__).resolve().parent.parent
GATING, SORT, STATS = "fused_gdn_gating", "moe_sort", "expert_stats"
KERNELS = [(GATING, case) for case in parity.sample(OPS[GATING])]
GPU = "rocm-gfx942"


def outcome(op, target, way, *, date="2026-01-02", good=True, selection="small", failure="", digest=None):
    """An outcome as an operator's process would report it."""
    used = emulation_of(named(target)) if way == "emulated" else named(target)
    digest = digest or parity_record.made_of(OPS[op], used, selection)
    row = {
        "op": op, "case": "M1", "passed": good, "served_by": "compiled", "errors": {"g": 1e-3}, "limits": {"g": 5e-3},
        "failure": "" if good else "wrong",
    }  # fmt: skip
    worst = {"case": "M1", "tensor": "g", "error": 1e-3, "limit": 5e-3, "of_limit": 0.2}
    rows = [] if way == "built" else [row]
    found = {"kernels": 1, "cases": len(rows), "passed": len(rows) * good, "worst": worst, "ran": way, "made_of": digest}
    report = {
        "format": 1, "date": f"{date}T00:00:00+00:00", "hardware": {"cpu": "some CPU", "cores": 2}, "versions": {},
        "target": target, "ran": way, "compile_only": way == "built", "selection": selection, "ops": {op: found}, "cases": rows,
    }  # fmt: skip
    return report | ({"failure": failure} if failure else {})


@pytest.fixture
def made(monkeypatch):
    """What was made, in order; nothing is compiled or run. ``failing`` are made without passing, ``ends`` ends the command."""
    calls, failing, ends = [], set(), set()

    def fake(op, target, way, selection, threads):
        if op in ends:
            raise KeyboardInterrupt
        calls.append((op, target.name, way))
        return [outcome(op, target.name, way, good=op not in failing, selection=selection)]

    monkeypatch.setattr(kernel_cache, "compile_each", lambda *_: {})
    monkeypatch.setattr(parity_matrix, "_outcomes", fake)
    return calls, failing, ends


def matrix(*argv):
    return cli.main(["parity", "--jobs", "1", *map(str, argv)])


def ops(*names):
    return [word for name in names for word in ("--op", name)]


def test_goes_on_where_it_ended(made, tmp_path, capsys):
    calls, failing, ends = made
    file = tmp_path / "matrix.json"
    argv = ("--target", f"{GPU},c", *ops(GATING, SORT, STATS), "--json", file)
    ends.add(STATS)
    assert matrix(*argv) == 130
    assert set(parity_record.load(file)) == {(op, GPU, "emulated") for op in (GATING, SORT)}

    ends.clear()
    failing.add(SORT)
    del calls[:]
    assert matrix(*argv) == 1
    assert (GATING, GPU, "emulated") not in calls and (SORT, GPU, "emulated") not in calls
    assert {(STATS, GPU, "emulated"), *((op, "c", "device") for op in (GATING, SORT, STATS))} <= set(calls)
    assert f"FAILED {SORT}, device [M1]: wrong" in capsys.readouterr().out

    # What failed is made again, and what was made of other sources.
    failing.clear()
    del calls[:]
    text = file.read_text()
    digest = parity_record.made_of(OPS[STATS], named("c"), "small")
    file.write_text(text.replace(digest, "0" * 16))
    assert matrix("--target", "c", *ops(GATING), "--json", file) == 0  # one target: the file has a matrix
    assert calls == [] and ", stale" not in capsys.readouterr().out
    assert not parity_record.is_fresh(parity_record.load(file)[STATS, "c", "device"])
    assert matrix(*argv) == 0
    assert set(calls) == {(SORT, "c", "device"), (STATS, "c", "device")}
    del calls[:]
    assert matrix(*argv) == 0 and calls == []
    # Few cases do not stand for all of them; all of them do for few.
    assert matrix(*argv[:2], *ops(GATING), "--cases", "all", "--json", file) == 0
    assert (GATING, "c", "device") in calls
    del calls[:]
    assert matrix(*argv) == 0 and calls == []
    assert parity_record.load(file)[GATING, "c", "device"]["selection"] == "all"


def test_what_another_machine_made_counts(made, tmp_path, capsys):
    calls, _, _ = made
    there, file = tmp_path / "there.json", tmp_path / "matrix.json"
    alone = outcome(SORT, GPU, "emulated", digest="of other sources") | {"target": f"emulated:{GPU}"}  # the report of one target
    on_device = [outcome(GATING, GPU, "device"), outcome(STATS, GPU, "device", digest="of other sources")]
    there.write_text(json.dumps({"format": 1, "target": "all", "runs": [*on_device, alone]}))
    assert matrix("--target", f"{GPU},", *ops(GATING, SORT, STATS), "--json", file, "--merge", there) == 0
    assert {call for call in calls if call[2] == "emulated"} == {(op, GPU, "emulated") for op in (SORT, STATS)}
    found = parity_record.load(file)
    assert parity_record.is_fresh(found[SORT, GPU, "emulated"])  # made here; the other machine's was stale
    assert (STATS, GPU, "device") in found and (STATS, GPU, "emulated") in found
    out = capsys.readouterr().out
    assert "1, stale, emulated 1" in out.replace("built 1, ", "")

    rows = {line.split(" | ")[0]: line for line in page_of(file).splitlines() if line.startswith("| `")}
    assert rows[f"| `{GATING}`"].endswith("| **1 of 1**, 1.0e-03 of 5e-03 |")
    assert "*emulated* 1 of 1" in rows[f"| `{SORT}`"] and "stale" in rows[f"| `{STATS}`"]


def page_of(file):
    command = [sys.executable, "tools/parity_page.py", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout


def test_rows_of_passed_cases_make_no_difference(made, tmp_path):
    """Files of older versions have them: they merge and make the same page, and the next command drops them."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    runs = [outcome(GATING, "c", "device"), outcome(SORT, "c", "device", good=False), outcome(STATS, GPU, "emulated")]
    old.write_text(json.dumps({"format": 1, "target": "all", "runs": runs}))
    assert matrix("--target", "c,", *ops(GATING), "--merge", old, "--json", new) == 0 and not made[0]
    rows = [row for run in json.loads(new.read_text())["runs"] for row in run["cases"]]
    assert rows == runs[1]["cases"] and parity_record.load(new) == parity_record.load(old)
    assert page_of(new) == page_of(old)
    assert matrix("--target", "c,", *ops(GATING), "--merge", old, "--json", old) == 0
    assert old.read_text() == new.read_text()


def test_of_two_outcomes_the_better_stays():
    def kept(*outcomes):
        return parity_record.merged({}, outcomes)[GATING, "c", "device"]

    old, new = outcome(GATING, "c", "device"), outcome(GATING, "c", "device", date="2026-01-03", good=False)
    stale = outcome(GATING, "c", "device", date="2026-01-04", digest="of other sources")
    whole = outcome(GATING, "c", "device", selection="all")
    assert kept(old, new) is new and kept(new, old) is new  # a failure is not hidden by an earlier success
    assert kept(new, stale) is new and kept(stale, old) is old
    assert kept(new, whole) is whole and kept(whole, new) is whole
    assert not parity_record.is_fresh(outcome(GATING, "c", "device") | {"target": "no such target"})


def test_digest_of_what_an_outcome_depends_on(monkeypatch):
    spec, target = OPS[GATING], named(GPU)
    digests = {parity_record.made_of(spec, target, "small"), parity_record.made_of(spec, target, "all")}
    digests |= {parity_record.made_of(spec, other, "small") for other in (emulation_of(target), named("c"))}
    limits = dataclasses.replace(spec, tolerance={**spec.tolerance, "float32": 1e-9})
    digests.add(parity_record.made_of(limits, target, "small"))
    digests.add(parity_record.made_of(dataclasses.replace(spec, cases=spec.cases[1:]), target, "small"))
    tuned = {"knobs": {"block": 64}}
    monkeypatch.setattr(parity_record.records, "lookup", lambda *_: tuned)
    digests.add(parity_record.made_of(spec, target, "small"))
    monkeypatch.setattr(parity_record.records, "algorithm_digest", lambda *_: "other sources")
    digests.add(parity_record.made_of(spec, target, "small"))
    assert len(digests) == 8


KILLED = """
import sys, time
import tvm_gdn
tvm_gdn.load_api()
from tvm_gdn import cli, kernel_cache
from tvm_gdn.commands import parity_matrix
from test_parity_matrix import outcome
def slow(op, target, way, selection, threads):
    time.sleep(0.05)
    return [outcome(op, target.name, way)]
kernel_cache.compile_each = lambda *_: {}
parity_matrix._outcomes = slow
sys.exit(cli.main(["parity", "--target", "c,x86", "--json", sys.argv[1], "--jobs", "3"]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_end_at_any_time_leaves_a_whole_file(end, tmp_path):
    file = tmp_path / "matrix.json"
    start = [sys.executable, "-c", KILLED, str(file)]
    with subprocess.Popen(start, cwd=ROOT / "tests", env=environment(), stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit and not (file.exists() and len(parity_record.load(file)) > 3):
            time.sleep(0.01)
        process.send_signal(end)
        status = process.wait(120)
    assert status == (130 if end == signal.SIGINT else -end)
    some = parity_record.load(file)
    assert 3 < len(some) < 2 * len(OPS)
    subprocess.run(start, cwd=ROOT / "tests", env=environment(), check=True, capture_output=True)
    found = parity_record.load(file)
    assert set(found) == {(op, name, "device") for op in OPS for name in ("c", "x86")}
    assert all(found[key] == entry for key, entry in some.items())


def test_for_real(tmp_path, caplog):
    """One operator on the target of the tests, in processes of its own."""
    target, file = env.target_name(), tmp_path / "matrix.json"
    name = named(target).name if target != "auto" else parity_matrix.resolve("auto").name
    assert matrix("--target", f"{name},", *ops(GATING), "--json", file) == 0
    (key,) = found = parity_record.load(file)
    assert key == (GATING, name, "device") and parity_record.is_fresh(found[key])
    told = found[key]["ops"][GATING]
    assert told["passed"] == told["cases"] == 2 and told["worst"]["case"] in map(label, parity.sample(OPS[GATING]))
    assert found[key]["cases"] == []
    assert matrix("--target", name, *ops(GATING), "--json", file) == 0
    assert "1 of 1 outcomes are known" in caplog.text
    assert parity_record.load(file) == found


def test_a_process_without_a_report_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernel_cache, "compile_each", lambda *_: {})
    monkeypatch.setattr(parity_matrix.sys, "executable", "/bin/false")
    file = tmp_path / "matrix.json"
    assert matrix("--target", "c,", *ops(GATING), "--json", file) == 1
    assert "exit status 1, no report" in parity_record.load(file)[GATING, "c", "device"]["failure"]
    assert "device FAILED" in capsys.readouterr().out


def test_kernels_that_do_not_compile_are_told_one_by_one(monkeypatch):
    cases = parity.sample(OPS[GATING])
    lines = [f"{GATING} [{command.arguments.geometry_of_case(OPS[GATING], cases[1])}]: first\nTargetError: too large"]

    def refuse(*_):
        raise BuildError("1 of 2 kernels could not be compiled:\n" + "\n".join(lines))

    first = kernel_cache.folder_of(OPS[GATING], command.arguments.geometry_of_case(OPS[GATING], cases[0]), named("musa-mp31"))
    monkeypatch.setattr(aot, "compile_all", refuse)
    monkeypatch.setattr(kernel_cache, "is_whole", lambda folder: folder == first)
    monkeypatch.setattr(command.parity_images, "of_operators", lambda *_: {})
    report = command.report_of(named("musa-mp31"), {GATING: cases}, compile_only=True)
    found = report["ops"][GATING]
    assert (found["kernels"], found["cases"], found["passed"], found["ran"]) == (1, 1, 0, "built")
    assert report["cases"][0]["failure"] == "TargetError: too large"
    report["ops"][GATING]["made_of"] = "any"
    assert parity_matrix.cell(report | {"selection": "small"}) == "built FAILED 1 of 2, stale"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--target", "cuda,c"), "cuda: a matrix takes names of files"),
        (("--target", "emulated:cuda-sm80,c"), "a matrix takes names of files"),
        (("--target", "c", "--jobs", "2"), "are for a matrix"),
        (("--target", "c", "--merge", "x.json"), "are for a matrix"),
        (("--target", "all", "--jobs", "-1"), "--jobs -1"),
        (("--target", "all", "--json", "FILE"), "no outcomes of `tvm_gdn parity --json`"),
        (("--target", "all", "--merge", "FILE"), "no outcomes of `tvm_gdn parity --json`"),
        (("--target", "x87,c"), "no target 'x87'"),
    ],
)
def test_refusals(argv, told, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"some": "thing"}')
    assert cli.main(["parity", *(str(file) if word == "FILE" else word for word in argv)]) == 2
    assert told in capsys.readouterr().err
    assert file.read_text() == '{"some": "thing"}'
    with pytest.raises(ArgumentError):
        parity_record.load(tmp_path / "nothing.json")
