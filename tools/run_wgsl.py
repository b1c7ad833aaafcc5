"""Run exported WGSL in a browser without a window, launched by its JSON description, against the float64 reference.

    python tools/run_wgsl.py [--browser chromium]

The browser's WebGPU is another's reading of the text (Tint, on SwiftShader where there is no GPU). Needs Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.server
import json
import queue
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch

from tvm_gdn import parity, torch_ops
from tvm_gdn.commands import arguments
from tvm_gdn.export import gpu_launch, gpu_source
from tvm_gdn.export.artifact import Request, compared, draw
from tvm_gdn.ops import OPS

_POOL = "dtype=float32,initial_state_indices=int32"
KERNELS = (
    ("fused_gdn_gating", "dtype=float32"), ("rms_norm_gated", "D=33,dtype=float32"), ("moe_sort", "topk_ids=int32"),
    ("expert_stats", "topk_ids=int32"), ("fused_recurrent_gated_delta_rule", "K=32,V=32,dtype=float32"),
    ("fused_recurrent_kda", "K=64,V=32,dtype=float32"), ("fused_recurrent_delta_rule", "K=32,V=64,dtype=float32,state_v_first=1"),
    ("fused_recurrent_gated_delta_rule_update", f"K=32,V=32,{_POOL}"),
    ("fused_sigmoid_gating_delta_rule_update", f"K=32,V=64,{_POOL},state_v_first=1"),
    ("packed_decode_gated_delta_rule", f"K=32,V=32,{_POOL}"),
)  # fmt: skip
_PAGE = """<script>(async () => {
const read = s => Uint8Array.from(atob(s), c => c.charCodeAt(0)), padded = (n, to) => Math.max(16, Math.ceil(n / to) * to);
const write = u => { let s = ''; for (const x of u) s += String.fromCharCode(x); return btoa(s); };
const adapter = await navigator.gpu.requestAdapter(), most = adapter.limits.maxStorageBuffersPerShaderStage;
const device = await adapter.requestDevice({requiredLimits: {maxStorageBuffersPerShaderStage: most}});
for (;;) {
  const job = await (await fetch('/job')).json(), out = {};
  if (!job.code) continue;
  try {
    device.pushErrorScope('validation');
    const module = device.createShaderModule({code: job.code}), use = GPUBufferUsage;
    const pipeline = await device.createComputePipelineAsync({layout: 'auto', compute: {module}});
    const make = (bytes, to, usage) => { const b = device.createBuffer({size: padded(bytes.length, to), usage});
      device.queue.writeBuffer(b, 0, bytes); return b; };
    const memory = job.memory.map(m => make(read(m), 4, use.STORAGE | use.COPY_DST | use.COPY_SRC));
    const all = [...job.bind.map(b => memory[b]), make(read(job.scalars), 16, use.UNIFORM | use.COPY_DST)];
    const entries = all.map((buffer, binding) => ({binding, resource: {buffer}}));
    const group = device.createBindGroup({layout: pipeline.getBindGroupLayout(0), entries});
    const commands = device.createCommandEncoder(), pass = commands.beginComputePass();
    pass.setPipeline(pipeline); pass.setBindGroup(0, group); pass.dispatchWorkgroups(...job.grid); pass.end();
    const back = memory.map(b => { const r = device.createBuffer({size: b.size, usage: use.MAP_READ | use.COPY_DST});
      commands.copyBufferToBuffer(b, 0, r, 0, b.size); return r; });
    device.queue.submit([commands.finish()]);
    out.memory = [];
    for (const b of back) { await b.mapAsync(1); out.memory.push(write(new Uint8Array(b.getMappedRange()))); }
    const error = await device.popErrorScope();
    if (error) out.error = error.message;
  } catch (error) { out.error = String(error); }
  await fetch('/result', {method: 'POST', body: JSON.stringify(out)});
}})()</script>"""
_jobs: queue.Queue[dict[str, Any]] = queue.Queue()
_results: queue.Queue[dict[str, Any]] = queue.Queue()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Gives the page, then jobs to it; takes results."""

    def do_GET(self) -> None:
        """The page, or the next job."""
        body = _PAGE
        if self.path == "/job":
            try:
                body = json.dumps(_jobs.get(timeout=1))
            except queue.Empty:
                body = "{}"
        self._answer(body)

    def do_POST(self) -> None:
        """A result."""
        _results.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer("")

    def _answer(self, body: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the browser was ended
            self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing: results go to stdout."""


def _kernel(found: dict[str, Any], code: str) -> Callable[..., None]:
    """A function of the operator's arguments that runs them in the browser."""

    def call(*args: Any) -> None:
        given, names = gpu_launch.named(found, args)
        tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
        (kernel,) = found["kernels"]
        grid = [gpu_launch.number(kernel["launch"].get(f"blockIdx.{axis}", "1"), names) for axis in "xyz"]
        bind, scalars = [], b""
        for one in kernel["arguments"]:
            if one["type"].startswith("handle"):
                bind.append(tensors.index(one["value"]))
            else:
                value = gpu_launch.number(one["value"], names)
                scalars += struct.pack("<f", value) if one["type"] == "float32" else struct.pack("<i", int(value))
        memory = [given[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in tensors]
        job = {"code": code, "bind": bind, "grid": grid, "memory": [base64.b64encode(x).decode() for x in memory]}
        _jobs.put({**job, "scalars": base64.b64encode(scalars + struct.pack("<I", grid[0] - 1)).decode()})
        result = _results.get(timeout=60)
        if "error" in result:
            raise RuntimeError(result["error"][:300])
        for name, text in zip(tensors, result["memory"], strict=True):
            tensor = given[name]
            raw = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            tensor.copy_(raw[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape))

    return call


def _run(op: str, dims: str) -> tuple[bool, str]:
    spec, geometry = OPS[op], arguments.parse_dims(OPS[op], dims)
    request = Request(spec, geometry)
    files = gpu_source.maker("webgpu")[0](request)
    kernel = _kernel(json.loads(files[f"{request.symbol}.json"]), files[f"{request.symbol}.wgsl"].decode())
    function = torch_ops.call_function(spec, geometry, kernel, "cpu")
    sizes = {"B": 2, "T": 5, "H": 1, "HV": 2, "S": 4, "M": 65, "G": 3, "E": 8, "k": 2}
    values, want = draw(request, **{**sizes, **geometry.axis})
    check = compared(spec, "", "", parity.run(spec, values, function), want)
    return bool(check.passed), check.detail


def main() -> int:
    """Run all; exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium", help="program to start")
    browser, wrong = parser.parse_args().browser, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--ignore-gpu-blocklist"]
        flags += ["--use-webgpu-adapter=swiftshader", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        page = f"http://localhost:{server.server_address[1]}/"
        with subprocess.Popen([browser, *flags, page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            try:
                for op, dims in KERNELS:
                    passed, detail = _run(op, dims)
                    wrong += not passed
                    print(f"{op} [{dims}]: {'ok' if passed else 'WRONG'}, {detail}", flush=True)
            finally:
                running.terminate()
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
