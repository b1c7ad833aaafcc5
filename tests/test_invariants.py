"""What holds for everything that is registered: each operator, target, subcommand and variable, present and future."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import tvm_gdn
from tvm_gdn import cases, check, cli, dispatch, env, images, reference
from tvm_gdn.errors import TargetError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Scalar
from tvm_gdn.target import named, target_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GATING = "fused_gdn_gating"
CASE = {"M": 3, "HV": 4, "dtype": "float32"}
each_op = pytest.mark.parametrize("op", OPS)


@each_op
def test_an_operator_is_complete(op):
    spec = OPS[op]
    assert spec.summary and "\n" not in spec.summary
    assert spec.cases and spec.bench and spec.cost is not None
    module = import_module(f"tvm_gdn.ops.tir.{spec.algorithm}")
    assert callable(getattr(module, spec.algorithm))


@each_op
def test_an_operator_has_a_reference_with_its_arguments(op):
    parameters = inspect.signature(getattr(reference, op)).parameters
    if inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()} or OPS[op].reference_arguments is not None:
        return  # hands its arguments on, or takes others that the SPEC makes of them; parity calls it with all of them
    for arg in OPS[op].inputs:
        assert arg.name in parameters, arg.name
        default = parameters[arg.name].default
        expected = arg.default if isinstance(arg, Scalar) and arg.default is not ... else None
        assert default in (inspect.Parameter.empty, expected), arg.name
    assert parameters["exact"].default is False


def test_the_map_of_modules_is_complete_and_true():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| module |") : text.index("Two tiers:")]
    package = ROOT / "tvm_gdn"
    mapped = set(re.findall(r"`([\w/]+\.py|\w+/)`", table))
    there = {path.name for path in package.glob("*.py")} | {f"{path.parent.name}/" for path in package.glob("*/*.*")}
    assert there - mapped == {"__init__.py"} | ({"__pycache__/"} & there)
    assert all((package / name).exists() for name in mapped)


@each_op
def test_bench_shapes_have_a_floor(op):
    spec = OPS[op]
    for case in spec.bench:
        small = {name: value for name, value in case.items() if name not in {"B", "T", "M", "S"}}
        geometry = check.geometry_of(spec, cases.draw(spec, {**small, "B": 1, "T": 1, "M": 1, "S": 1}))
        moved, computed = spec.cost(cases.sizes_of(spec, case), geometry)
        assert moved > 0 and computed > 0


def documented(text, section):
    """Names that a section of a numpydoc text describes."""
    found = re.search(rf"^{section}\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", text, re.S | re.M)
    assert found, section
    heads = [line.partition(" : ")[0] for line in found[1].splitlines() if line[:1].strip()]
    return {name.strip() for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", [name for name in tvm_gdn.__all__ if inspect.isfunction(getattr(tvm_gdn, name))])
def test_public_functions_document_every_argument_result_and_source(name):
    function = getattr(tvm_gdn, name)
    text = inspect.getdoc(function)
    assert documented(text, "Parameters") == set(inspect.signature(function).parameters)
    assert documented(text, "Returns")
    assert "ArgumentError" in documented(text, "Raises")
    assert "arXiv:" in text.partition("Notes")[2]
    assert not re.search(r"\{\w+\}", text)  # a text shared by several functions, not filled in


@pytest.mark.parametrize("name", target_names())
def test_a_target_says_what_it_is(name):
    target = named(name)
    assert target.description and target.device and target.codegen


#: Names of vendors, their interfaces and instruction sets. "cuda" as a torch device type is data, not a branch.
VENDORS = re.compile(r"\b(nvidia|amd|intel|cuda|rocm|hip|musa|metal|x86\S*|avx\S*|amx\S*|sm_\d+\S*|gfx\d+\S*|mp_?\d+)\b", re.I)
#: They describe a machine to its user; nothing that is computed depends on it.
REPORTS = {"doctor.py", "machine.py"}
#: What is no choice of how or what to compute, and why it cannot be a target's data.
EXCEPTIONS = {
    ("images.py", "x86_64"),  # the host part of device code: this machine's own LLVM triple
    ("images.py", "cuda"),  # TVM's name of a source format
    ("gpu_source.py", "cuda"),  # the format of exported source that can run emulated as it stands
    ("kt_kernel.py", "AVX2"),  # names of its classes
    ("device.py", "hip"),  # where torch keeps the name of an architecture
    *(("torch_modules.py", word) for word in ("cuda", "hip", "_cuda_load_module")),  # whether torch has a loader, by its names
}


def conditions(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, (ast.Compare, ast.match_case)):
            yield node


def vendor_branches(source):
    found = []
    for condition in conditions(ast.parse(source)):
        words = [node.value for node in ast.walk(condition) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        words += [node.attr for node in ast.walk(condition) if isinstance(node, ast.Attribute)]
        found += [word for word in words if VENDORS.search(word.replace("_", " "))]
    return found


def test_no_branch_on_a_vendor_outside_targets_and_schedules():
    assert vendor_branches("if device == 'cuda':\n    pass") == ["cuda", "cuda"]
    assert vendor_branches("x = 1 if torch.cuda.is_available() else 2")
    assert vendor_branches("y = [f for f in flags if f.startswith('avx512')]")
    paths = [path for path in (ROOT / "tvm_gdn").rglob("*.py") if path.name not in REPORTS]
    assert not {(path.name, word) for path in paths for word in vendor_branches(path.read_text())} - EXCEPTIONS


def test_environment_variables_stand_in_one_module_and_one_table():
    sources = {path: path.read_text() for folder in ("tvm_gdn", "schedules") for path in (ROOT / folder).rglob("*.py")}
    mentioned = {name for text in sources.values() for name in re.findall(r"TVM_GDN_[A-Z_]+", text)}
    documented_ones = set(re.findall(r"^\| `(TVM_GDN_[A-Z_]+)`", README, re.M))
    read = set(re.findall(r'"(TVM_GDN_[A-Z_]+)"', sources[ROOT / "tvm_gdn" / "env.py"]))
    assert mentioned == documented_ones == read
    assert len(read) <= 8
    assert read == set(re.findall(r"TVM_GDN_[A-Z_]+", cli._EPILOG))
    readers = {path.name for path, text in sources.items() if any(map(reads_environment, ast.walk(ast.parse(text))))}
    assert readers == {"env.py"}


def reads_environment(node):
    """Whether a node of a syntax tree reads one of our variables."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"get", "getenv", "pop"}:
        name = node.args[0] if node.args else None
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        name = node.slice
    else:
        return False
    return isinstance(name, ast.Constant) and str(name.value).startswith("TVM_GDN_")


def test_subcommands_stand_in_the_readme():
    assert set(re.findall(r"^\| `tvm_gdn (\w+)", README, re.M)) == set(cli.COMMANDS)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine without a compiler, packs or cached kernels."""
    monkeypatch.setenv("TVM_GDN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TVM_GDN_PACK_PATH", raising=False)
    monkeypatch.setattr(dispatch, "version_of", lambda name: "none")
    yield monkeypatch
    monkeypatch.undo()
    dispatch.reset()


def test_auto_falls_back_with_one_line_that_says_why(no_compiler, caplog):
    no_compiler.setenv("TVM_GDN_TARGET", "auto")
    dispatch.reset()
    arguments = cases.draw(OPS[GATING], CASE)
    with caplog.at_level(logging.DEBUG, "tvm_gdn"):
        results = [tvm_gdn.fused_gdn_gating(**arguments) for _ in range(3)]
    want = reference.fused_gdn_gating(**arguments)
    assert all(torch.equal(got, wanted) for result in results for got, wanted in zip(result, want, strict=True))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert GATING in lines[0] and "torch reference" in lines[0] and "apache-tvm is not installed" in lines[0]
    assert dispatch.served_by(GATING).startswith("fallback (torch reference): ")


def test_an_explicit_target_never_falls_back(no_compiler):
    no_compiler.setenv("TVM_GDN_TARGET", "x86")
    dispatch.reset()
    with pytest.raises(tvm_gdn.errors.BuildError, match="apache-tvm is not installed"):
        tvm_gdn.fused_gdn_gating(**cases.draw(OPS[GATING], CASE))
    no_compiler.setenv("TVM_GDN_TARGET", "no-such-target")
    dispatch.reset()
    with pytest.raises(TargetError, match="no-such-target"):
        tvm_gdn.fused_gdn_gating(**cases.draw(OPS[GATING], CASE))
    assert env.target_name() == "no-such-target"


def test_a_cache_folder_that_cannot_be_used_is_named(no_compiler, tmp_path):
    no_compiler.setattr(dispatch, "version_of", lambda name: "0.27.0")
    (tmp_path / "file").write_text("")
    no_compiler.setenv("TVM_GDN_CACHE_DIR", str(tmp_path / "file"))
    dispatch.reset()
    with pytest.raises(tvm_gdn.errors.BuildError, match=rf"cache folder {tmp_path}/file cannot be used .*TVM_GDN_CACHE_DIR"):
        tvm_gdn.fused_gdn_gating(**cases.draw(OPS[GATING], CASE))
    no_compiler.setenv("TVM_GDN_TARGET", "auto")
    dispatch.reset()
    tvm_gdn.fused_gdn_gating(**cases.draw(OPS[GATING], CASE))
    assert "TVM_GDN_CACHE_DIR" in dispatch.served_by(GATING)


def test_device_sources_stand_alone():
    """They are exported and compiled elsewhere, so what `csrc` has in several files must be in them."""
    text = images.with_functions("void kernel();")
    assert '#include "' not in text and text.endswith("void kernel();")
    for name in ("tvm_gdn_move", "tvm_gdn_load_a", "tvm_gdn_wgmma_one", "tvm_gdn_wgmma_products", "tvm_gdn_split_sums"):
        assert f" {name}(" in text
