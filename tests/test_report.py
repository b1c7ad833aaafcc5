"""The report page: its numbers are those of the inputs, regressions are found and marked, bad input is refused by name."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tvm_gdn import cli, env
from tvm_gdn.ops import OPS
from tvm_gdn.report import data
from tvm_gdn.report.compare import compare
from tvm_gdn.report.matrix import Heat, cells, columns_of, dtypes_of, heatmap
from tvm_gdn.target import target_names

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

GATING = "fused_gdn_gating"
CHUNK = "chunk_gated_delta_rule"
SORT = "moe_sort"
HARDWARE = {"cpu": "Quick CPU", "machine": "x86_64", "system": "Linux-6", "cores": 2, "torch_threads": 2, "memory_gb": 8.0}
VERSIONS = {"python": "3.12.1", "tvm_gdn": "0.1.0", "torch": "2.13.0"}


class Page(HTMLParser):
    """Tables of a page as lists of rows of texts, by id; every id; text of the whole page; attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.ids, self.loads, self.words, self.svgs = {}, [], [], [], 0
        self.classes, self.open, self._table, self._cell = [], [], None, None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.svgs += tag == "svg"
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.loads += [v for n, v in attrs.items() if n in {"src", "href", "xlink:href", "srcset"} and not v.startswith("#")]
        if tag in {"script", "link", "iframe", "img"}:
            self.loads.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(attrs.get("id") or f"{attrs.get('class')}{len(self.tables)}", [])
        if tag == "tr":
            self._table.append([])
        if tag == "br":
            self.handle_data(" ")
        if tag in {"td", "th"}:
            self._cell = []
            self._table[-1].append((self._cell, attrs.get("class", "") or ""))

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._cell = None

    def handle_data(self, text):
        self.words.append(text)
        if self._cell is not None:
            self._cell.append(text)

    def rows(self, name: str) -> list[list[str]]:
        return [[" ".join("".join(cell).split()) for cell, _ in row] for row in self.tables[name]]

    def latency(self) -> list[list[str]]:
        return [row for name in self.tables if name.startswith("latency") for row in self.rows(name)]


def bench_case(op: str, case: str, ours: float, copy_us: float = 10.0, transformers_us: float = 80.0, **changes: object) -> dict:
    medians = {"tvm_gdn": ours, "kernel": ours - 0.5, "copy": copy_us, "transformers": transformers_us}
    return {
        "op": op, "case": case, "served_by": "compiled (x86-avx512, tuned)", "passed": True,
        "errors": {"o": 1.6e-3}, "limits": {"o": 5e-3}, "peer_errors": {}, "peer_notes": {}, "bytes": 1000, "flops": 2000,
        "us": {name: {"median": t, "q1": 0.9 * t, "q3": 1.1 * t} for name, t in medians.items()},
        "gb_per_s": 1000 / ours / 1e3, "gflop_per_s": 2000 / ours / 1e3, "share_of_copy": copy_us / ours,
        "times_faster": {"transformers": transformers_us / ours},
    } | changes  # fmt: skip


def bench(*cases: dict, day: int = 1, **changes: object) -> dict:
    return {
        "format": 1, "date": f"2026-11-{day:02}T12:00:00+00:00", "hardware": dict(HARDWARE), "versions": dict(VERSIONS),
        "target": "x86-avx512", "threads": 2, "seconds": 0.5, "peers": True, "cases": list(cases), "calls": [],
        "first_call": None,
    } | changes  # fmt: skip


def parity_case(op: str, case: str, error: float = 1e-3, limit: float = 5e-3, **changes: object) -> dict:
    return {
        "op": op, "case": case, "passed": error <= limit, "served_by": "compiled (x86-avx512, tuned)",
        "errors": {"o": error}, "limits": {"o": limit}, "failure": "",
    } | changes  # fmt: skip


def parity(*cases: dict, ops: tuple[str, ...] = (), **changes: object) -> dict:
    names = dict.fromkeys([*(case["op"] for case in cases), *ops])
    return {
        "format": 1, "date": "2026-11-01T12:00:00+00:00", "hardware": dict(HARDWARE), "versions": dict(VERSIONS),
        "target": "x86-avx512", "compile_only": False, "ops": {op: {"kernels": 3} for op in names}, "cases": list(cases),
    } | changes  # fmt: skip


PARITY = parity(
    parity_case(GATING, "M1 HV6 fp32", 4.9e-8, 1e-5), parity_case(CHUNK, "T65 bf16 state-fp32", 1.75e-3),
    parity_case(CHUNK, "T63 bf16 state-fp32", 1.5e-3),
)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write JSON to a file of the test's folder."""

    def write(name: str, content: object):
        path = tmp_path / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def report(capsys, tmp_path, write):
    """Run the command on contents; status, stdout and the parsed page."""

    def report(current, *more, options=(), parities=PARITY):
        files = [write("bench", current), write("parity", parities), *(write(f"more{i}", x) for i, x in enumerate(more))]
        status = cli.main(["report", *map(str, files), "-o", str(tmp_path / "page.html"), "--force", *options])
        captured = capsys.readouterr()
        assert not captured.err
        return status, captured.out, Page((tmp_path / "page.html").read_text())

    return report


def loaded(tmp_path, content: dict):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    return data.load_runs(path)[0]


def test_page_of_real_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(OPS, GATING, dataclasses.replace(OPS[GATING], cases=OPS[GATING].cases[:2]))
    files = [str(tmp_path / name) for name in ("bench.json", "parity.json", "page.html")]
    argv = ["bench", "--op", GATING, "--case", "M1024", "--seconds", "0.02", "--no-calls", "--json", files[0]]
    assert cli.main(argv) == 0
    assert cli.main(["parity", "--target", env.target_name(), "--op", GATING, "--json", files[1]]) == 0
    capsys.readouterr()
    assert cli.main(["report", *files[:2], "-o", files[2]]) == 0
    assert "nothing was compared" in capsys.readouterr().out
    assert "No earlier benchmark was given" in Path(files[2]).read_text()
    page = Page(Path(files[2]).read_text())
    (row,) = json.loads(Path(files[0]).read_text())["cases"]
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    matrix = page.rows("matrix")
    here = env.target_name()
    assert matrix[0] == ["operator", here]
    assert f"Nothing at all was recorded for {', '.join(name for name in target_names() if name != here)}" in page.text
    assert [line[0] for line in matrix[1:]] == list(OPS)
    found = dict(zip(matrix[0], next(line for line in matrix if line[0] == GATING), strict=True))
    assert found[env.target_name()].startswith("works (2 cases")
    (_, line) = page.latency()
    assert f"{row['share_of_copy']:.0%}".replace("%", " %") in line
    assert f"{row['gb_per_s']:.1f}" in line and f"{row['times_faster']['reference']:.1f}" in line
    assert float(line[1].split()[0].replace(",", "")) == pytest.approx(row["us"]["tvm_gdn"]["median"], rel=0.01)


def test_numbers_of_the_page_are_those_of_the_inputs(report):
    current = bench(
        bench_case(CHUNK, "T512 HV32 bf16", 20.0), bench_case(CHUNK, "T4096 HV32 bf16", 1234.4, 400, 9000),
        bench_case("brand_new_op", "E8 int4", 3.0, us={n: {"median": t, "q1": t, "q3": t} for n, t in
                   {"tvm_gdn": 3.0, "gemm": 2.0, "onednn": 6.0}.items()}, times_faster={"onednn": 2.0}, share_of_copy=None),
        calls=[{"op": CHUNK, "case": "T1", "public": 5.83, "operator": 4.0, "kernel": 0.5, "allocation": 1.0, "overhead": 5.33}],
    )  # fmt: skip
    status, out, page = report(current)
    assert status == 0 and "3 shapes" in out
    assert page.loads == [] and len(page.ids) == len(set(page.ids))
    assert page.svgs == 2
    lines = {row[0]: row for row in page.latency()}
    assert lines["T512"][1] == "20.0 (18.0–22.0)"
    assert lines["T512"][2:] == ["19.5", "0.1", "0.1", "1.6e-3 of 5e-3", "10.0", "50 %", "80.0", "4.0"]
    assert lines["T4096"][1] == "1,234 (1,111–1,358)"
    assert lines["T4096"][-4:] == ["400", "32 %", "9,000", "7.3"]
    assert "all shapes: HV32 bf16" in page.text
    # A contender without a ratio is a floor, one with a ratio a peer, whatever they are called.
    header = next(row for row in page.latency() if "gemm, µs" in row)
    assert header[-4:] == ["gemm, µs", "floor / ours", "onednn, µs", "×"]
    assert lines["E8 int4"][-4:] == ["2.00", "67 %", "6.00", "2.0"]
    assert "5.83" in page.text and "5.33" in page.text
    for fact in ("Quick CPU", "torch 2.13.0", "2026-11-01 12:00 UTC", "3 of 3"):
        assert fact in page.text
    heat = next(page.rows(name) for name in page.tables if name.startswith("heatmap"))
    assert heat[0] == ["operator", "bf16", "fp32"]
    assert heat[1] == [GATING, "–", "4.9e-8 0 % of 1e-5 o"]
    assert heat[2] == [CHUNK, "1.8e-3 35 % of 5e-3 o, state-fp32", "–"]


def test_regression_is_found_marked_and_fails(report):
    slow, steady = bench_case(CHUNK, "T512", 26.0), bench_case(CHUNK, "T64", 5.0)
    before = bench(bench_case(CHUNK, "T512", 20.0), bench_case(CHUNK, "T64", 5.2), bench_case(GATING, "M1", 1.0), day=1)
    current = bench(slow, steady, bench_case(CHUNK, "T9", 1.0), day=2)
    status, out, page = report(current, before, options=["--fail-on-regression", "10%"])
    assert status == 1
    assert "1 of 2 compared shapes regressed by more than 10 %" in out
    assert f"{CHUNK} [T512]: +30 % (same hardware: the smaller of time +30 % and median ratio" in out
    (_, marked) = page.rows("regressed")
    assert marked[:5] == [CHUNK, "T512", "20.0", "26.0", "▲ +30 %"]
    assert marked[6] == "more0.json, 2026-11-01 12:00"
    lines = {row[0]: row for row in page.latency()}
    assert [lines[case][-1] for case in ("T512", "T64", "T9")] == ["▲ +30 %", "-4 %", "–"]
    assert "+30 %" in "".join(page.words).split("history:")[1].split("</svg>")[0]  # in the chart too
    assert "Without an earlier run to compare with: 1 shapes" in page.text
    assert f"In the newest earlier run but not in this one (1): {GATING} M1" in page.text
    assert report(current, before)[0] == 0  # marked, but nobody asked to fail
    assert report(current, before, options=["--fail-on-regression", "30%"])[0] == 0
    status, _, page = report(current, before, options=["--fail-on-regression", "30%"])
    assert "regressed" not in page.tables


@pytest.mark.parametrize(
    ("now", "hardware", "factor", "words"),
    [
        # Everything 40 % slower: the machine was busy.
        ({"ours": 28.0, "copy_us": 14.0, "transformers_us": 112.0}, "Quick CPU", 1.0, "same hardware: the smaller of time +40 %"),
        # Only the others became faster: no regression of ours.
        ({"ours": 20.0, "copy_us": 5.0, "transformers_us": 40.0}, "Quick CPU", 1.0, "copy +100 %, transformers +100 %"),
        ({"ours": 24.0}, "Quick CPU", 1.2, "time +20 % and median ratio to copy +20 %, transformers +20 %"),
        # Other hardware: half the time, but a worse share of the floor and the peer.
        ({"ours": 10.0, "copy_us": 4.0, "transformers_us": 32.0}, "Slow CPU", 1.25, "other hardware: median ratio to copy +25 %"),
        # Other hardware, ten times slower in all: no regression.
        (
            {"ours": 200.0, "copy_us": 100.0, "transformers_us": 800.0},
            "Slow CPU",
            1.0,
            "other hardware: median ratio to copy +0 %",
        ),
    ],
)
def test_what_is_compared(tmp_path, now, hardware, factor, words):
    then = loaded(tmp_path, bench(bench_case(CHUNK, "T512", 20.0), day=1))
    current = loaded(tmp_path, bench(bench_case(CHUNK, "T512", **now), day=2, hardware={**HARDWARE, "cpu": hardware}))
    change = compare(current, [then])[CHUNK, "T512"]
    assert change.factor == pytest.approx(factor)
    assert words in change.compared
    assert change.regressed(0.1) is (factor > 1.1)


def test_baseline_is_the_newest_earlier_run_of_the_series(tmp_path):
    def run(us: float, day: int, **changes: object):
        return loaded(tmp_path, bench(bench_case(CHUNK, "T512", us), day=day, **changes))

    current = run(20.0, 9)
    other_cpu = {"hardware": {**HARDWARE, "cpu": "Other CPU"}}
    oldest, older, newer = run(10, 1), run(12, 3), run(14, 4, **other_cpu)
    excluded = [run(1, 5, target="x86-avx2"), run(1, 6, threads=1), run(1, 10)]
    assert compare(current, [oldest, newer, older, *excluded])[CHUNK, "T512"].baseline is older  # same hardware before newer
    assert compare(current, [newer])[CHUNK, "T512"].time is None
    assert compare(current, excluded) == {}
    lonely = copy.deepcopy(bench(bench_case(CHUNK, "T512", 90.0), day=9, **other_cpu))
    for name in ("copy", "transformers"):
        del lonely["cases"][0]["us"][name]
    change = compare(loaded(tmp_path, lonely), [oldest])[CHUNK, "T512"]
    assert change.factor is None and not change.regressed(0.0) and "not compared" in change.compared


def test_wrong_now_is_a_regression(report):
    before = bench(bench_case(CHUNK, "T512", 20.0), day=1)
    wrong = bench(bench_case(CHUNK, "T512", 10.0, passed=False, errors={"o": float("nan")}), day=2)
    status, out, page = report(wrong, before, options=["--fail-on-regression", "10%"])
    assert status == 1 and "is wrong or not compiled now" in out
    assert page.rows("regressed")[1][4] == "▲ wrong now"
    assert "0 of 1" in page.text and "nan of 5e-3" in page.text


def test_matrix_and_failures(report, tmp_path):
    fell_back = {"passed": False, "served_by": "fallback (torch reference): no kernel", "failure": "fallback (torch reference)"}
    found = parity(
        parity_case(GATING, "M1 fp32"), parity_case(CHUNK, "T65 bf16", **fell_back), parity_case(CHUNK, "T63 bf16"),
        parity_case("chunk_kda", "T65 fp16", 7.5e-2), parity_case("chunk_kda", "T63 fp16", float("nan")),
    )  # fmt: skip
    compiled = parity(ops=(GATING, CHUNK), compile_only=True, target="vega-gpu")
    ignored = parity(ops=(GATING,), compile_only=True, date="2026-12-24T00:00:00Z")
    _, _, page = report(bench(bench_case(CHUNK, "T512", 20.0)), compiled, ignored, parities=found)
    header, *rows = page.rows("matrix")
    # Only targets with something recorded have a column.
    assert header == ["operator", "vega-gpu", "x86-avx512"]
    by_op = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_op[GATING]["x86-avx512"] == "works (1 cases, 1e-03)"  # a run wins over a newer compilation
    assert by_op[CHUNK]["x86-avx512"] == "fallback (1 of 2 cases)"
    assert by_op["chunk_kda"]["x86-avx512"] == "2 of 2 cases fail"
    assert [by_op[op]["vega-gpu"] for op in (GATING, CHUNK, "chunk_kda")] == ["compiles", "compiles", "planned"]
    classes = {row[0][0][0]: [cls for _, cls in row] for row in page.tables["matrix"][1:]}
    column = header.index("x86-avx512")
    assert [classes[op][column].split()[-1] for op in (GATING, CHUNK, "chunk_kda")] == ["works", "fallback", "fails"]
    assert "o 7.5e-2, limit 5e-3" in page.text and "2 of 5" in page.text
    runs = [loaded(tmp_path, content) for content in (found, compiled)]
    assert cells(runs)["chunk_kda", "x86-avx512"].status == "fails"
    (heat,) = heatmap(runs, "x86-avx512")[1]["chunk_kda"]["fp16"]
    assert heat.case == "T63 fp16" and heat.error != heat.error  # NaN comes before every number
    assert heatmap(runs, "vega-gpu") == ([], {})


def test_emulated_is_never_works(report, tmp_path, write, capsys):
    """Runs of all targets in one file: each column says how its outcome came about, and the stronger evidence wins."""
    gpu, other = "rocm-gfx942", "musa-mp31"
    image = {"format": "hsaco", "built": True, "text": "hsaco built and inspected, not run, arch gfx942, spills 0"}
    emulated = parity(parity_case(GATING, "M63 bf16"), ops=(CHUNK,), target=gpu, ran="emulated")
    emulated["ops"][GATING] |= {"ran": "emulated", "image": image}
    emulated["ops"][CHUNK] |= {"ran": "none", "reason": "no schedule of 'chunk'"}
    built = parity(ops=(GATING,), compile_only=True, target="cuda-sm80")
    runs = {"format": 1, "date": "2026-11-20T00:00:00Z", "target": "all", "runs": [PARITY, emulated, built]}
    _, _, page = report(bench(bench_case(CHUNK, "T512", 20.0)), parities=runs)
    header, *rows = page.rows("matrix")
    row = dict(zip(header, next(row for row in rows if row[0] == GATING), strict=True))
    assert row[gpu] == "emulated (1 cases, 1e-03)"
    assert row["cuda-sm80"] == "compiles" and row["x86-avx512"].startswith("works")
    assert f"{gpu} (emulated)" in page.text

    # A matrix has a run per operator; what they were made on stands there once.
    alone = [parity(parity_case(op, "M63 bf16"), target=gpu, ran="emulated") for op in (GATING, CHUNK)]
    _, _, page = report(bench(bench_case(CHUNK, "T512", 20.0)), parities={**runs, "runs": alone})
    assert page.text.count(f"parity of {gpu}") == 1

    file = write("matrix", runs)
    found = cells(data.load_runs(file))
    assert found[GATING, gpu].status == "emulated" and "not run" in found[GATING, gpu].detail
    assert found[CHUNK, gpu].status == "planned"
    alone = parity(parity_case(GATING, "M63 bf16"), target=f"emulated:{other}")  # a run of one target that says it in its name
    later = parity(parity_case(GATING, "M63 bf16"), target=gpu, date="2026-10-01T00:00:00Z")
    more = [*data.load_runs(file), loaded(tmp_path, alone), loaded(tmp_path, later)]
    assert cells(more)[GATING, other].text == "emulated (1 cases, 1e-03)"
    assert cells(more)[GATING, gpu].status == "works"  # on the device, though older
    table = subprocess.run(
        [sys.executable, "tools/op_table.py", str(file)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    ).stdout  # fmt: skip
    assert "| emulated (1 cases, 1e-03) |" in next(line for line in table.splitlines() if f"`{GATING}`" in line)
    wrong = write("wrong", {**runs, "runs": [{**emulated, "ops": {GATING: {"kernels": 1, "ran": "somehow"}}}]})
    assert (
        cli.main(["report", str(write("b", bench(bench_case(CHUNK, "T512", 20.0)))), str(wrong), "-o", str(tmp_path / "x")]) == 2
    )
    assert "'ran': expected one of device, emulated, built, none, got 'somehow'" in capsys.readouterr().err


def test_rows_that_a_matrix_has_dropped_count(tmp_path):
    """Of cases that passed it has how many there were and the one nearest to its limit; of those that failed every row."""
    worst = {"case": "M63 HV6 bf16", "tensor": "beta", "error": 1.6e-3, "limit": 5e-3, "of_limit": 0.32}
    passed = parity(target="rocm-gfx942", ops=(GATING, CHUNK, SORT), ran="emulated")
    told = {"kernels": 2, "cases": 12, "passed": 12, "served_by": ["compiled (rocm-gfx942, default)"], "ran": "emulated"}
    passed["ops"] |= {GATING: {**told, "worst": worst}, SORT: {**told, "worst": None}}
    failed = parity(parity_case(CHUNK, "T65 bf16", 7.5e-2, 5e-3, passed=False))
    failed["ops"][CHUNK] |= {"cases": 10, "passed": 9}
    runs = [loaded(tmp_path, content) for content in (passed, failed)]
    found = cells(runs)
    assert found[GATING, "rocm-gfx942"].text == "emulated (12 cases, 2e-03)"
    assert found[GATING, "rocm-gfx942"].detail == "nearest to its limit: beta 1.6e-03 of 5e-03 at M63 HV6 bf16"
    assert found[SORT, "rocm-gfx942"].text == "emulated (12 cases)"
    assert found[CHUNK, "rocm-gfx942"].status == "planned"
    assert found[CHUNK, "x86-avx512"].text == "1 of 10 cases fail"
    assert heatmap(runs, "rocm-gfx942")[1] == {GATING: {"bf16": [Heat(1.6e-3, 5e-3, "beta", "M63 HV6 bf16", 1)]}}


def test_dtypes_in_labels():
    assert dtypes_of("M1 HV6 fp16 A_log-float32+dt_bias-float32") == "fp16"
    assert dtypes_of("B2 bf16 state-fp32 i32 state_v_first") == "bf16, state-fp32"
    assert dtypes_of("E8 D2048 weight-int4 bf16") == "weight-int4, bf16"
    assert dtypes_of("B2 T65") == "fp32"
    assert columns_of("weight-int4, bf16") == ("bf16", "weight-int4") and columns_of("state-bf16") == ("fp32", "state-bf16")


def test_names_in_the_inputs_are_escaped(report):
    evil = "<script>alert(1)</script>"
    current = bench(bench_case(evil, f"T1 {evil}", 5.0), bench_case(evil, "T2 & <b>", 5.0), target=evil)
    _, _, page = report(current, parities=parity(parity_case(evil, evil), target=evil))
    assert page.loads == [] and evil in page.text


def test_bad_input_is_refused_and_nothing_is_written(capsys, tmp_path, write):
    good, fine = write("good", bench(bench_case(CHUNK, "T512", 20.0))), write("fine", PARITY)
    page = tmp_path / "page.html"

    def refused(*argv: object) -> str:
        status = cli.main(["report", *map(str, argv)])
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "") and captured.err.startswith("tvm_gdn: error: ")
        assert "Traceback" not in captured.err
        assert not page.exists() and not list(tmp_path.glob(".page*"))
        return captured.err

    def broken(**changes: object):
        return write("broken", bench(bench_case(CHUNK, "T512", 20.0, **changes)))

    assert "neither.json: cannot be read (No such file" in refused(good, tmp_path / "neither.json", "-o", page)
    assert "cannot be read (Is a directory)" in refused(tmp_path, fine, "-o", page)
    assert "not JSON" in refused(write("broken", "{'a': 1}"), fine, "-o", page)
    assert "not JSON" in refused(write("broken", "[" * 100000), fine, "-o", page)
    assert "neither a benchmark nor a parity report" in refused(write("broken", {"kernels": []}), fine, "-o", page)
    assert "neither a benchmark nor a parity report" in refused(write("broken", "[1]"), fine, "-o", page)
    assert "is a parity run, but BENCH must be a benchmark; the order is" in refused(fine, good, "-o", page)
    twin = write("twin", bench(bench_case(CHUNK, "T512", 20.0)))
    assert "is a benchmark, but PARITY must be a parity run" in refused(good, twin, "-o", page)
    assert "given twice" in refused(good, fine, good, "-o", page)
    assert "format 2; this version reads format 1" in refused(write("broken", bench(format=2)), fine, "-o", page)
    assert "a benchmark without cases" in refused(write("broken", bench()), fine, "-o", page)
    assert "'date': expected an ISO date, got 'soon'" in refused(write("broken", bench(date="soon")), fine, "-o", page)
    assert "'target': expected str, got NoneType" in refused(write("broken", bench(target=None)), fine, "-o", page)
    assert "cases[0]: us: 'tvm_gdn' is missing" in refused(broken(us={}), fine, "-o", page)
    zero = {"tvm_gdn": {"median": 0.0, "q1": 0.0, "q3": 0.0}}
    assert "expected positive median, q1 and q3" in refused(broken(us=zero), fine, "-o", page)
    assert "cases[0]: errors: 'o': expected int or float, got str" in refused(broken(errors={"o": "small"}), fine, "-o", page)
    assert "'errors' and 'limits' name different tensors" in refused(broken(errors={}), fine, "-o", page)
    assert "'limits': expected no negative numbers" in refused(broken(limits={"o": -1}), fine, "-o", page)
    assert "'passed': expected bool, got int" in refused(broken(passed=1), fine, "-o", page)
    assert "give a percentage, such as 10%" in refused(good, fine, "-o", page, "--fail-on-regression", "0.1")
    assert "give a percentage" in refused(good, fine, "-o", page, "--fail-on-regression", "nan%")
    assert "is one of the inputs" in refused(good, fine, "-o", good, "--force")
    assert "the folder /no/such does not exist" in refused(good, fine, "-o", "/no/such/page.html")
    assert "is a folder" in refused(good, fine, "-o", tmp_path, "--force")
    assert json.loads(good.read_text())["format"] == 1


def test_a_page_that_exists_needs_force(capsys, tmp_path, write):
    argv = ["report", str(write("bench", bench(bench_case(CHUNK, "T512", 20.0)))), str(write("parity", PARITY))]
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert cli.main([*argv, "-o", str(page)]) == 2
    assert "exists; --force writes over it" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert cli.main([*argv, "-o", str(page), "--force"]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "parity.json", "page.html"}


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages_name_the_extra(capsys, monkeypatch, tmp_path, write, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "tvm_gdn.report.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    argv = [str(write("bench", bench(bench_case(CHUNK, "T512", 20.0)))), str(write("parity", PARITY))]
    assert cli.main(["report", *argv, "-o", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert package in err and "pip install 'tvm_gdn[report]'" in err
    assert not (tmp_path / "page.html").exists()


def test_help_says_what_to_give():
    done = subprocess.run([sys.executable, "-m", "tvm_gdn", "report", "--help"], capture_output=True, text=True, check=True)
    assert re.search(r"BENCH PARITY\s+\[MORE", done.stdout) and "10%" in done.stdout
