"""GPU sources with launch descriptions, run by those descriptions alone: emulated, and by an OpenCL runtime."""

from __future__ import annotations

import json
import re

import pytest
from compilers import needs_cxx
from exports import CHUNK, UPDATE, request, run

from tvm_gdn import schedule, target
from tvm_gdn.export import gpu_launch, gpu_source, opencl_run
from tvm_gdn.export.artifact import fill

GPU_KERNELS = [
    ("opencl-src", ".cl", UPDATE, "K=16,V=32,dtype=float32"),
    ("cuda-src", ".cu", CHUNK, "K=32,V=16,dtype=bfloat16"),
    ("musa-src", ".mu", "rms_norm_gated", "D=33,dtype=bfloat16"),
]
GPU_MORE = [
    ("cuda-src", ".cu", UPDATE, "K=16,V=32,dtype=float32"),
    (
        "cuda-src",
        ".cu",
        "causal_conv1d_fn",
        "W=4,L=3,dtype=bfloat16,state=float32,with=conv_states+has_initial_state+cache_indices",
    ),
    ("musa-src", ".mu", "chunk_kda", "K=32,V=32,dtype=bfloat16"),
    ("musa-src", ".mu", "moe_sort", ""),
    ("opencl-src", ".cl", "causal_conv1d_update", "W=4,L=3,dtype=float32,state=float32,activation=silu"),
    ("metal-src", ".metal", "rms_norm_gated", "D=33,dtype=float32,norm_before_gate=0"),
    ("metal-src", ".metal", "moe_route", "E=16,dtype=float32"),
    ("cuda-src", ".cu", "fused_experts", "D=104,I=40,dtype=bfloat16"),
    ("cuda-src", ".cu", "fused_experts_packed", "D=64,G=4,KD=2,ND=2,KI=2,dtype=bfloat16,scheme=bf16"),
    ("musa-src", ".mu", "fused_experts", "D=52,I=40,dtype=float32"),
    (
        "opencl-src",
        ".cl",
        "causal_conv1d_fn",
        "W=4,L=3,dtype=bfloat16,state=float32,with=conv_states+has_initial_state+cache_indices",
    ),
    ("webgpu-src", ".wgsl", "rms_norm_gated", "D=33,dtype=float32"),
    ("webgpu-src", ".wgsl", "packed_decode_gated_delta_rule", "K=32,V=32,dtype=float32,initial_state_indices=int32"),
]


@needs_cxx
@pytest.mark.parametrize(
    ("form", "suffix", "op", "dims"), [*GPU_KERNELS, *(pytest.param(*kernel, marks=pytest.mark.slow) for kernel in GPU_MORE)]
)
def test_gpu_source(form, suffix, op, dims, tmp_path, capsys):
    """What is run is launched by the written description alone: names, order of parameters, sizes, scratch memory, grid."""
    path = tmp_path / "kernel"
    assert run("--op", op, "--format", form, "--dims", dims, "-o", path) == 0
    told = capsys.readouterr().out
    ran = "this source" if form == "cuda-src" else "the same TIR as CUDA C"
    assert re.search(rf"{ran}, launched by the description, [^\n]*device emulation on the CPU +ok", told), told
    (source,), (description,) = path.glob(f"*{suffix}"), path.glob("*.json")
    found, text = json.loads(description.read_text()), source.read_text()
    assert found["arguments"] and set(found["tensors"]) <= set(found["arguments"])
    known = {"min", "max", *found["arguments"], *found["workspaces"]}
    known |= {name for tensor in found["tensors"].values() for name in (*tensor["shape"], *tensor.get("strides", ()))}
    for kernel in found["kernels"]:
        assert kernel["name"] in text and {"blockIdx.x", "threadIdx.x"} <= set(kernel["launch"])
        # Every value can be worked out from the operator's own arguments.
        values = [*kernel["launch"].values(), *(argument["value"] for argument in kernel["arguments"])]
        assert {name for value in values for name in re.findall(r"[A-Za-z_]\w*", value)} - {
            "if",
            "else",
            "or",
            "and",
            "not",
        } <= known
    if form == "opencl-src":
        runtime = opencl_run.runtime()
        by = r"an OpenCL runtime +not run" if runtime is None else rf"{re.escape(runtime[1])} +ok"
        assert re.search(rf"this source, launched by the description, [^\n]*{by}", told), told
        assert "shuffle" not in text and "barrier" not in text and "__local" not in text
    if form in {"opencl-src", "metal-src", "webgpu-src"}:
        assert "tvm_gdn_" not in text


def test_gpu_languages_name_algorithms_that_have_a_schedule():
    for language, algorithms in gpu_source.ALGORITHMS.items():
        for algorithm in algorithms:
            assert schedule.find_space(algorithm, target.resolve(gpu_source.LANGUAGES[language][1]))


@needs_cxx
def test_a_wrong_launch_description_fails(tmp_path):
    """The description takes part in the verification: two strides in turn, half of the blocks, another order of pointers."""
    wanted = request("rms_norm_gated", "D=33,dtype=float32")
    build, verify = gpu_source.maker("cuda")
    files = build(wanted)
    fill(tmp_path, files)
    name, text = f"{wanted.symbol}.json", files[f"{wanted.symbol}.cu"].decode()
    library = gpu_source.emulated_library(text, "cuda", json.loads(files[name]), tmp_path)

    def passes(found):
        return gpu_source.numbers(wanted.spec, wanted.geometry, gpu_launch.launcher(library, found)).passed

    assert passes(json.loads(files[name]))
    for change in (
        lambda kernel: kernel["arguments"][1].update(value="x"),
        lambda kernel: kernel["arguments"][4].update(value="M"),
        lambda kernel: kernel["launch"].update({"blockIdx.x": "0"}),
    ):
        found = json.loads(files[name])
        change(found["kernels"][0])
        assert not passes(found)
    (tmp_path / name).write_text(json.dumps(found))
    assert verify(wanted, tmp_path)[1].passed is False


def test_gpu_sources_refuse_by_name(tmp_path, capsys):
    assert run("--op", CHUNK, "--format", "metal-src", "--dims", "K=32,V=32", "-o", tmp_path / "x") == 2
    text = capsys.readouterr().err
    assert f"metal-src has no {CHUNK}; {CHUNK} has: onnx" in text and "metal-src has: fused_gdn_gating, " in text
    assert "cuda-src: float32, bfloat16" in text
    assert run("--op", UPDATE, "--format", "opencl-src", "--dims", "K=32,V=16,dtype=float32", "-o", tmp_path / "x") == 2
    assert "V = 16; allowed: multiples of 32" in capsys.readouterr().err
    words = ("--op", "fused_gdn_gating", "--format", "webgpu-src", "--dims", "dtype=bfloat16", "-o", tmp_path / "x")
    assert run(*words) == 2
    assert "a bfloat16" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_opencl_text_that_is_wrong_fails():
    """The runtime reads the text itself: one that does not compile, one that computes something else."""
    if opencl_run.runtime() is None:
        pytest.skip("needs pyopencl and an OpenCL runtime: pip install pyopencl[pocl]")
    wanted = request("fused_gdn_gating", "dtype=float32")
    files = gpu_source.maker("opencl")[0](wanted)
    launch, text = json.loads(files[f"{wanted.symbol}.json"]), files[f"{wanted.symbol}.cl"].decode()
    for changed, passed in ((text, True), (text.replace("exp(", "exp2("), False), (text.replace("{", "{ ?", 1), False)):
        made = gpu_source._on_opencl(wanted.spec, wanted.geometry, "opencl", launch, changed)
        assert made["passed"] is passed, made
