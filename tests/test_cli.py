"""The command line: every subcommand runs for real on small inputs; messages, statuses and JSON are as promised."""

import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import environment

import tvm_gdn
from tvm_gdn import cli, dispatch, env, pack, parity
from tvm_gdn.bench import contenders, first_result, machine
from tvm_gdn.commands import aot, arguments, demo, listing, parity_matrix
from tvm_gdn.errors import ArgumentError, TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.target import named, resolve

ROOT = Path(__file__).resolve().parent.parent
GATING = "fused_gdn_gating"
PACKED = "packed_decode_gated_delta_rule"
FUSED = "fused_conv_gated_delta_rule_update"
DECODE = next(case for case in OPS[PACKED].bench if case["dtype"] == "float32")
KERNELS = [
    *((GATING, case) for case in (OPS[GATING].bench[0], *OPS[GATING].cases[:4])),
    (PACKED, OPS[PACKED].bench[0]),
    (PACKED, DECODE),
]


@pytest.fixture(autouse=True)
def _same_process_state(monkeypatch):
    """A command may choose a target for its process; the next test must not see it."""
    monkeypatch.setenv("TVM_GDN_TARGET", os.environ["TVM_GDN_TARGET"])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    monkeypatch.undo()
    dispatch.reset()


@pytest.fixture
def packs_only(monkeypatch, tmp_path):
    """A folder for packs that nothing else writes to."""
    monkeypatch.setenv("TVM_GDN_PACK_PATH", str(tmp_path / "packs"))
    dispatch.reset()
    return tmp_path / "packs"


def run(capsys, *argv: object) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def build_gating(capsys, folder: Path, *more: str) -> tuple[int, str, str]:
    return run(capsys, "build", "--op", GATING, "--dims", "dtype=float16,dt_bias=bfloat16", "-o", folder, *more)


def test_version_and_help_without_heavy_imports():
    code = (
        "import sys\nfrom tvm_gdn import cli\n"
        "for argv in (['--version'], ['--help'], *([name, '--help'] for name in cli.COMMANDS)):\n"
        "    try:\n        cli.main(argv)\n"
        "    except SystemExit as error:\n        assert error.code == 0, argv\n"
        "print(sorted({'tvm', 'optuna', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"tvm_gdn {tvm_gdn.__version__}"
    assert lines[-1] == "[]"
    for command in cli.COMMANDS:
        assert f"    {command} " in done.stdout


COMMAND = "import sys; sys.argv = ['/usr/bin/tvm_gdn', *sys.argv[1:]]; from tvm_gdn.cli import main; sys.exit(main())"


@pytest.mark.parametrize("start", [("-c", COMMAND), ("-m", "tvm_gdn")], ids=["script", "module"])
@pytest.mark.parametrize(("argv", "status"), [(("--version",), 0), (("--help",), 0), (("fly",), 2), ((), 2), (("--fly",), 2)])
def test_help_version_and_usage_errors_do_not_wait_for_torch(start, argv, status):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *start, *argv], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tvm_gdn.cli" in imported
    assert not {"torch", "tvm", "numpy", "tvm_ffi"} & imported


def test_a_command_line_with_work_to_do_has_the_operators():
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "list", "--json", "--op", GATING], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert GATING in done.stdout
    code = "import sys; sys.argv = ['tvm_gdn']; import tvm_gdn; print(hasattr(tvm_gdn, 'OPS')); tvm_gdn.load_api(); print(tvm_gdn.OPS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("False") and GATING in done.stdout


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "tvm_gdn", "build", "--target", "x87", "--op", GATING, "--dims", "dtype=float32"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tvm_gdn: error: no target 'x87'; known: auto, ")
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("TVM_GDN_LOG", "DEBUG")
    status, _, err = run(capsys, "bench", "--op", GATING, "--case", "no such shape")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("tvm_gdn: error: --case 'no such shape': no benchmark shape has all of these words")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build"], "say what to build: --model NAME"),
        (["build", "--op", GATING], f"for example --op {GATING} --dims dtype=bfloat16)"),
        (["build", "--op", FUSED], "--dims K=128,V=128,W=4,L=3,dtype=bfloat16)"),
        (["export", "--op", PACKED, "--format", "c", "-o", "unwritten"], "for example --dims K=128,V=128,dtype="),
        (["bench", "--op", GATING, "--case", "fp33"], "allowed: "),
        (["bench", "--op", GATING, "--model", "qwen3-moe"], f"--model qwen3-moe has no benchmark shape of {GATING}"),
        (["build", "--model", "qwen0"], "model 'qwen0' is not known; allowed: qwen3-next"),
        (["build", "--model", "qwen3-next", "--dims", "K=8"], "--model already says which geometries"),
        (["build", "--op", PACKED, "--dims", "K=0"], "each at least 1; got {'K': 0"),
        (["build", "--op", PACKED, "--dims", "K=ten"], "--dims K=ten: give a whole number"),
        (["build", "--op", PACKED, "--dims", "Q=8"], f"--dims Q: {PACKED} has K, V, dtype"),
        (["build", "--op", PACKED, "--dims", "dtype=int9"], "--dims dtype=int9: allowed: float32"),
        (["build", "--op", PACKED, "--dims", "dtype=int32"], "mixed_qkv: 'int32' is not allowed"),
        (["build", "--op", PACKED, "--dims", "with=cu_seqlens"], "cu_seqlens: allowed for"),
        (["build", "--op", PACKED, "--dims", "K"], "write NAME=VALUE"),
        (["build", "--op", GATING, "--geometry", "{}"], "not the JSON of a geometry"),
        (
            ["build", "--op", GATING, "--geometry", '{"axes":{},"dtypes":{"a":"float32"},"attrs":{}}'],
            "missing ['A_log'",
        ),
        (["build", "--op", GATING, "--dims", "", "--jobs", "-1", "-o", "unwritten"], "--jobs -1"),
        (["bench", "--seconds", "0"], "--seconds 0.0: give a positive number"),
        (["bench", "--threads", "0"], "--threads 0"),
        (["bench", "--json", "/no/such/folder/x.json"], "the folder /no/such/folder does not exist"),
        (["parity", "--target", "{"], "is not valid JSON"),
        (["tune", "--trials", "0"], "--trials must be positive"),
        (["demo", "--tokens", "1"], "tokens: got 1"),
    ],
)
def test_errors_name_the_argument(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("tvm_gdn: error: ")
    assert message in err
    assert "Traceback" not in err


def test_unknown_command_and_operator(capsys):
    for argv, message in ((["fly"], "invalid choice: 'fly'"), (["bench", "--op", "x"], GATING)):
        with pytest.raises(SystemExit) as error:
            cli.main(argv)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", OPS)
def test_dims_of_a_message_are_those_of_a_shape(op):
    shape = arguments.geometry_of_case(OPS[op], OPS[op].bench[0])
    assert arguments.parse_dims(OPS[op], arguments.example_dims(OPS[op])).key == shape.key


def test_dims_and_bench_shape_give_the_same_geometry():
    spec = OPS[PACKED]
    for case in spec.bench:
        text = f"K={case['K']},V={case['V']},dtype={case['dtype']},state={case['state_dtype']}"
        assert arguments.parse_dims(spec, text).key == arguments.geometry_of_case(spec, case).key
    geometry = arguments.parse_dims(spec, "K=8,V=20,index=int32,state_v_first=1,with=initial_state_indices,a=float32")
    assert geometry.axis == {"K": 8, "V": 20}
    assert geometry.attr == {"state_v_first": True}
    assert geometry.dtype["initial_state_indices"] == "int32"
    assert (geometry.dtype["a"], geometry.dtype["b"]) == ("float32", "bfloat16")
    assert arguments.parse_geometry(spec, geometry.key).key == geometry.key
    update = OPS["fused_recurrent_gated_delta_rule_update"]
    assert "cu_seqlens" in arguments.parse_dims(update, "with=initial_state_source+cu_seqlens").dtype
    with pytest.raises(ArgumentError, match="differs from the other tensors of the role 'data'"):
        arguments.parse_dims(update, "q=float32")


def test_build_writes_one_pack_and_never_over_another(capsys, packs_only):
    folder = packs_only / "mine"
    status, out, _ = build_gating(capsys, folder)
    assert status == 0
    assert str(folder) in out and "Calls find this pack." in out
    row = next(line.split() for line in out.splitlines() if line.startswith(GATING))
    assert row[1] == "1" and row[-1] in {"tuned", "default", "generic"}
    manifest = pack.read(folder).manifest
    assert [entry.op for entry in manifest.kernels] == [GATING]
    assert manifest.kernels[0].geometry.dtype["dt_bias"] == "bfloat16"
    before = (folder / pack.MANIFEST).stat().st_mtime_ns

    status, _, err = build_gating(capsys, folder)
    assert status == 2
    assert "a pack is there already" in err and "--force" in err
    assert (folder / pack.MANIFEST).stat().st_mtime_ns == before
    assert build_gating(capsys, folder, "--force")[0] == 0
    assert (folder / pack.MANIFEST).stat().st_mtime_ns != before

    precious = packs_only / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    status, _, err = build_gating(capsys, precious, "--force")
    assert status == 2 and "is no pack" in err
    assert (precious / "file").read_text() == "keep"


def test_concurrent_builds_leave_one_whole_pack(packs_only):
    spec = OPS[GATING]
    wanted = [(spec, arguments.parse_dims(spec, "dtype=float16,dt_bias=bfloat16"))]
    folder = packs_only / "shared"

    def build() -> int:
        return sum(len(aot.build_pack(wanted, resolve(env.target_name()), folder)) for _ in range(20))

    assert build() == 20
    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(build) for _ in range(4)]] == [20] * 4
    found = pack.read(folder)
    assert found.file(found.manifest.kernels[0]).is_file()
    assert [path.name for path in packs_only.iterdir()] == ["shared"]


def test_build_for_a_target_given_as_json(capsys, tmp_path):
    text = json.dumps({"inherits": "x86", "codegen": {"kind": "llvm", "mcpu": "haswell"}})
    assert build_gating(capsys, tmp_path / "custom", "--target", text)[0] == 0
    assert resolve(resolve(text).text).digest() == resolve(text).digest()


def test_message_about_a_missing_kernel_is_a_command_that_builds_it(capsys, monkeypatch, packs_only, tmp_path):
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TVM_GDN_DISABLE_JIT", "1")
    dispatch.reset()
    a, heads = torch.randn(3, 4, dtype=torch.float16), torch.randn(4)
    with pytest.raises(tvm_gdn.errors.PackError) as error:
        tvm_gdn.fused_gdn_gating(heads, a, a, heads)
    command = shlex.split(str(error.value).split("Build it with: ")[1])
    assert command[0] == "tvm_gdn"
    status, out, _ = run(capsys, *command[1:])
    assert status == 0 and "Calls find this pack." in out
    dispatch.reset()
    g, beta = tvm_gdn.fused_gdn_gating(heads, a, a, heads)
    want = -heads.double().exp() * torch.nn.functional.softplus(a.double() + heads.double())
    assert parity.rms_ratio(g, want) < 1e-5
    assert parity.rms_ratio(beta, a.double().sigmoid()) < 2e-3
    assert dispatch.served_by(GATING).startswith("compiled")


def test_list_names_every_operator_and_target(capsys, packs_only):
    assert build_gating(capsys, packs_only / "mine")[0] == 0
    dispatch.reset()
    status, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert status == 0
    targets = {target["name"] for target in found["targets"]}
    assert {(entry["op"], entry["target"]) for entry in found["schedules"]} == {(op, target) for op in OPS for target in targets}
    for entry in found["schedules"]:
        assert entry["word"] in {"tuned", "default", "generic"} | ({"none"} if named(entry["target"]).device != "cpu" else set())
        assert entry["reason"] and entry["geometries"] >= 1
    assert found["auto"] in targets
    assert [(p["target"], p["kernels"]) for p in found["packs"] if p["folder"] == str(packs_only / "mine")] == [
        (resolve(env.target_name()).name, 1)
    ]
    status, text, _ = run(capsys, "list")
    assert all(f"\n{op} " in f"\n{text}" for op in OPS)
    shown, legend = text.split("\n\n")[:2]
    assert max(map(len, shown.splitlines())) <= 130
    titles = shown.splitlines()[0].split()[1:]
    grouped = {name for line in legend.splitlines() for name in line.partition(": ")[2].removesuffix(" (not here)").split(", ")}
    assert targets <= grouped | set(titles)
    table = text[text.index("\ntarget ") :].split("\n\n")[0].strip().splitlines()[1:]
    assert [line.split()[0] for line in table] == [target["name"] for target in found["targets"]]
    words = {" ".join(line.split()[2:4]).removesuffix(" and") for line in table}
    assert all(word.startswith(("yes", "when named", "lacks ")) for word in words), words
    assert "why:" not in text and f"  {GATING} on " in run(capsys, "list", "--op", GATING)[1].partition("why:")[2]
    assert str(packs_only / "mine") in text


def test_list_without_a_compiler_shows_packs_alone(capsys, monkeypatch):
    monkeypatch.setattr(listing, "version_of", lambda package: "none")
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert out.startswith("apache-tvm is not installed")
    assert "packs are looked for in" in out and "default" not in out.split("auto means")[0]


def test_foreign_and_damaged_packs_are_reported(capsys, packs_only):
    for name in ("foreign", "damaged"):
        assert build_gating(capsys, packs_only / name)[0] == 0
    path = packs_only / "foreign" / pack.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "requires": ["avx9000"]}))
    library = next((packs_only / "damaged").glob("fused*.so"))
    library.write_bytes(library.read_bytes()[:-1])
    dispatch.reset()

    status, out, _ = run(capsys, "list")
    assert status == 0
    assert "refused" in out and "avx9000" in out
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1
    checks = [check for check in json.loads(out)["checks"] if check["name"] == "packs"]
    assert ["avx9000" in c["found"] for c in checks if c["status"] == "warn"] == [True]
    assert ["was changed or cut short" in c["found"] for c in checks if c["status"] == "fail"] == [True]
    assert all(check["advice"] for check in checks if check["status"] != "ok")


def test_doctor_on_a_healthy_machine(capsys, monkeypatch, packs_only):
    assert build_gating(capsys, packs_only / "mine")[0] == 0
    dispatch.reset()
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    checks = {check["name"]: check for check in found["checks"]}
    assert status == 0
    expected = {"python", "torch", "apache-tvm-ffi", "cpu", "targets", "C compiler", "cache folder", "packs", "threads"}
    assert expected | {"OpenMP", "environment"} <= set(checks)
    assert any(str(packs_only / "mine") in check["found"] for check in found["checks"] if check["status"] == "ok")
    # Builds for devices add their name to torch's own version only.
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert checks["OpenMP"]["found"].startswith("kernels run on torch's threads: ")

    monkeypatch.setenv("TVM_GDN_TARGE", "auto")
    monkeypatch.setenv("TVM_GDN_CHECKS", "yse")
    monkeypatch.setenv("TVM_GDN_LOG", "LOUD")
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", "/proc/nowhere")
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "TVM_GDN_TARGE: not known, has no effect" in out
    assert "TVM_GDN_CHECKS: this value has no effect; allowed: 0 or 1; TVM_GDN_LOG: this value" in out
    assert "fail  cache folder: /proc/nowhere" in out


def test_doctor_knows_the_ffi_release_that_crashes(capsys, monkeypatch):
    versions = {**machine.versions(), "apache-tvm-ffi": "0.1.15.post2", "apache-tvm": "none"}
    monkeypatch.setattr(machine, "versions", lambda: versions)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "fail  apache-tvm-ffi: 0.1.15.post2" in out and "0.1.15 is known to crash" in out
    assert "warn  apache-tvm: not installed" in out


def test_bench_reports_errors_beside_numbers(capsys, tmp_path):
    file = tmp_path / "bench.json"
    status, out, _ = run(capsys, "bench", "--op", GATING, "--case", "M1024", "--threads", 1, "--seconds", 0.02, "--json", file)
    report = json.loads(file.read_text())
    assert status == 0
    assert {"date", "hardware", "versions", "target", "threads", "cases", "calls", "first_call"} <= set(report)
    assert [report["threads"], report["hardware"]["torch_threads"]] == [1, 1]
    (row,) = report["cases"]
    assert row["passed"] and row["served_by"].startswith("compiled")
    assert set(row["errors"]) == {"g", "beta"}
    assert all(0 <= row["errors"][name] <= limit for name, limit in row["limits"].items())
    assert row["errors"]["beta"] > 0  # a bf16 result is rounded
    assert row["bytes"] == 1024 * 32 * (3 * 2 + 4)
    assert set(row["us"]) == {"tvm_gdn", "kernel", "copy", "reference"}
    for times in row["us"].values():
        assert 0 < times["q1"] <= times["median"] <= times["q3"]
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"]["tvm_gdn"]["median"] / 1e3, rel=1e-3)
    (call,) = report["calls"]
    assert call["op"] == GATING and call["kernel"] > 0 and call["allocation"] > 0
    first = report["first_call"]
    assert first["pack"]["served_by"].startswith("compiled")
    assert not any("compiled" in line for line in first["pack"]["log"])
    assert first["compiler"]["from_import_ms"] > first["pack"]["call_ms"] > 0
    assert sum(line.startswith("tvm_gdn: compiled ") for line in first["compiler"]["log"]) == 1
    assert "M1024" in out and "of copy" in out and "first call" in out


def test_first_results_of_fresh_processes(capsys):
    status, out, _ = run(capsys, "bench", "--first-result", 2, "--op", GATING, "--op", PACKED, "--json", "-")
    report = json.loads(out)
    assert status == 0 and report["runs"] == 2
    assert [row["op"] for row in report["first_results"]] == [GATING, PACKED]
    for row in report["first_results"]:
        assert row["served_by"].startswith("compiled")
        assert [len(row[stage]["all"]) for stage in ("torch_ms", *first_result.STAGES, "total_ms")] == [2] * 6
        parts = [sum(row[stage]["all"][run] for stage in first_result.STAGES) for run in range(2)]
        assert parts == pytest.approx(row["total_ms"]["all"], abs=0.01)
        assert row["call_ms"]["min"] > 0 and row["torch_ms"]["min"] > row["context_ms"]["min"]
    assert GATING in first_result.render(report)
    status, _, error = run(capsys, "bench", "--first-result", 0)
    assert status == 2 and "--first-result 0" in error


@pytest.mark.parametrize("names", [{"transformers"}, pytest.param({"transformers", "torch_compile"}, marks=pytest.mark.slow)])
def test_bench_of_decode_with_peers(capsys, monkeypatch, names):
    monkeypatch.setattr(contenders, "PEERS", {name: contenders.PEERS[name] for name in names})
    argv = ("--op", PACKED, "--case", "B1 fp32", "--seconds", 0.02, "--no-calls", "--peers", "--json", "-")
    status, out, _ = run(capsys, "bench", *argv)
    (row,) = json.loads(out)["cases"]
    assert status == 0
    assert set(row["peer_errors"]) == names, row["peer_notes"]
    for name in names:
        assert 0 < row["peer_errors"][name] < row["limits"]["o"]
        assert row["us"][name]["median"] > 0 and row["times_faster"][name] > 0


def test_parity_passes_and_fails_loudly(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(OPS, GATING, dataclasses.replace(OPS[GATING], cases=OPS[GATING].cases[:4]))
    file = tmp_path / "parity.json"
    status, out, _ = run(capsys, "parity", "--target", env.target_name(), "--op", GATING, "--json", file)
    report = json.loads(file.read_text())
    assert status == 0
    found = report["ops"][GATING]
    assert (found["cases"], found["passed"]) == (4, 4)
    assert 0 < found["worst"]["error"] <= found["worst"]["limit"]
    assert all(text.startswith("compiled") for text in found["served_by"])
    assert "passed" in out

    table = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "op_table.py"), str(file)],
        capture_output=True, text=True, check=True, env=environment(),
    ).stdout  # fmt: skip
    row = next(line for line in table.splitlines() if line.startswith(f"| `{GATING}`"))
    assert "works (4 cases" in row
    assert table.count("planned") == len(OPS) - 1

    genuine = parity.run
    monkeypatch.setattr(parity, "run", lambda *args: {name: torch.zeros_like(x) for name, x in genuine(*args).items()})
    status, out, _ = run(capsys, "parity", "--op", GATING)
    assert status == 1
    assert "4 FAILED" in out
    assert "g has error 1.0e+00, limit 1e-05" in out


def test_cases_with_a_dtype_that_the_target_has_not_are_no_failures(capsys, monkeypatch):
    cases = [{"M": 3, "HV": 4, "dtype": dtype} for dtype in ("float32", "float16")]
    monkeypatch.setitem(OPS, GATING, dataclasses.replace(OPS[GATING], cases=tuple(cases)))
    reason = "target c has no type for float16 (a, b, dt_bias)"
    status, out, _ = run(capsys, "parity", "--target", "c", "--op", GATING, "--json", "-")
    report = json.loads(out)
    found = report["ops"][GATING]
    assert status == 0
    assert (found["kernels"], found["cases"], found["passed"], found["ran"]) == (1, 1, 1, "device")
    assert list(found["unsupported"].values()) == [reason]
    assert parity_matrix.cell(report) == "1 (1 not supported)"

    monkeypatch.setitem(OPS, GATING, dataclasses.replace(OPS[GATING], cases=tuple(cases[1:])))
    status, out, _ = run(capsys, "parity", "--target", "c", "--op", GATING)
    assert status == 0
    assert reason in out and "no schedule" in out

    dispatch.reset()
    with pytest.raises(TargetError, match=r"float16 \(a, b, dt_bias\)"):
        parity.check_case(OPS[GATING], cases[1])


def test_demo_compares_tokens(capsys, monkeypatch):
    monkeypatch.setattr(demo, "BATCHES", (1,))
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, seconds=0.05))
    status, out, _ = run(capsys, "demo", "--tokens", 4, "--prompt-tokens", 3, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["decode"]["tokens_equal"] and len(found["decode"]["tokens"]) == 4
    assert found["decode"]["served_by"].startswith("compiled")


def test_tune_records_what_it_measured(capsys, monkeypatch, tmp_path):
    file = tmp_path / "records.json"
    argv = ("--op", GATING, "--trials", 2, "--storage", tmp_path / "trials.journal", "--output", file)
    status, out, _ = run(capsys, "tune", *argv)
    assert status == 0
    (record,) = json.loads(file.read_text())["records"]
    assert record["op"] == GATING
    assert GATING in out and str(file) in out
