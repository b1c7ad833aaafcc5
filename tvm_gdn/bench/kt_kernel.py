"""The experts of kt-kernel, each build of its extension in a process of its own: two cannot be loaded into one.

The child draws the same weights once more, and times its own calls, so that the pipe between the processes does not count.
Between requests it stands still: one thread of kt-kernel, which takes tasks from a queue, spins for as long as the process
lives, and its workers for 50 ms after a task.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tvm_gdn.bench import layers
from tvm_gdn.errors import TvmGdnError

INSTALL = "pip install --no-deps kt-kernel (its dependencies would replace torch)"
#: Builds of the wheel that are compared, and the CPU features (of /proc/cpuinfo) that each needs.
BUILDS = {"avx2": ("avx2", "fma"), "avx512_bf16": ("avx512_bf16", "avx512_vnni"), "amx": ("amx_bf16", "amx_int8")}
_WIDE = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}
#: Build -> scheme -> class of the extension. The one for AVX2 has no int8; its int4 has a scale for every group of weights.
KINDS = {"avx2": {"bf16": "AVX2BF16_MOE", "int4_kgroup": "AVX2RawInt4_MOE"}, "avx512_bf16": _WIDE, "amx": _WIDE}
#: Weights of a scale, where it is not a channel's.
GROUP = 32
_KEPT: list[Any] = []
#: Most tokens of a call; it reserves scratch for so many.
LONGEST = 8192
#: Seconds of calls that are submitted before one waits for them, or `TOGETHER` calls: so looking for their end does not count.
WHOLE = 0.2
TOGETHER = 4000
#: Seconds between looks for the end of a batch. kt-kernel's own wait spins, and takes a core from its workers.
LOOK = 0.5e-3
#: A bf16 NaN, as an integer.
_NAN = 0x7FC0
#: prctl: the signal that a process gets when its parent ends.
_PARENT_ENDS = 1


def extension(build: str) -> Path | None:
    """File of a build; None where kt-kernel or the build is not installed. Nothing is imported."""
    found = importlib.util.find_spec("kt_kernel")
    if found is None or found.origin is None:
        return None
    return next(iter(Path(found.origin).parent.glob(f"_kt_kernel_ext_{build}.*.so")), None)


def missing(build: str) -> str:
    """Why a build cannot run here; empty if it can."""
    if extension(build) is None:
        return f"not installed: {INSTALL}"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    lacking = [flag for flag in BUILDS[build] if flag not in flags]
    return f"this CPU lacks {', '.join(lacking)}" if lacking else ""


class Layer:
    """One layer's experts in every scheme, in a child process.

    Parameters
    ----------
    build : str
        One of `BUILDS`.
    schemes : list of str
        Of the build's `KINDS`.
    sizes : dict
        D, I, E, k, as in `layers.MODELS`; the child draws `layers.weights` of them in bf16.
    threads : int
        Of the child's pool; beside them one spins that hands out tasks. Where that has no core of its own, a worker shares one
        with it, and every call waits for the scheduler to come back to that worker: some 8 ms.
    cores : sequence of int
        Of its workers, one each, and behind them at least one of all other threads; empty: workers run where kt-kernel binds
        them, which is the machine's first cores.

    The child loads while this process goes on; `ready` waits for it, and stops it.
    """

    def __init__(self, build: str, schemes: list[str], sizes: dict[str, int], threads: int, cores: Sequence[int] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.schemes = schemes
        arguments = (other, str(extension(build)), {scheme: KINDS[build][scheme] for scheme in schemes}, sizes, threads, cores)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def ready(self) -> None:
        """Return once the weights are loaded.

        Raises
        ------
        TvmGdnError
            The child could not load the extension or the weights.
        """
        self._answer()
        self._signal(signal.SIGSTOP)

    def ask(self, *request: Any) -> Any:
        """Wake the child, send a request, stop the child, return the answer."""
        self._signal(signal.SIGCONT)
        self.pipe.send(request)
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            raise TvmGdnError(f"kt-kernel's process ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise TvmGdnError(f"kt-kernel: {answer}")
        return answer

    def close(self) -> None:
        """End the child."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


class Call:
    """A contender: one scheme; calling it returns the output of the first routing, `timed` takes all in turn, in the child."""

    def __init__(self, layer: Layer, scheme: str, routings: Sequence[layers.Routing]) -> None:
        tokens = routings[0][0].shape[0]
        self.layer, self.key = layer, (scheme, tokens)
        given = [(x.view(torch.int16).numpy(), share.float().numpy(), ids.long().numpy()) for x, share, ids in routings]
        layer.ask("prepare", self.key, given)

    def __call__(self) -> torch.Tensor:
        """Output of the call."""
        return torch.from_numpy(self.layer.ask("call", self.key)).view(torch.bfloat16)

    def timed(self, count: int) -> float:
        """Microseconds per call of `count` calls or more."""
        taken: float = self.layer.ask("time", self.key, count)
        return taken


def _serve(pipe: Connection, file: str, kinds: dict[str, str], sizes: dict[str, int], threads: int, cores: Sequence[int]) -> None:
    """The child: load, then answer requests until None comes."""
    try:
        # A stopped process would outlive its parent.
        ctypes.CDLL(None).prctl(_PARENT_ENDS, signal.SIGKILL)
        # It greets and logs on the standard output, where the parent's results go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        found = importlib.util.spec_from_file_location("kt_kernel_ext", file)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        pool = module.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        infer = module.CPUInfer(pool)
        drawn = layers.weights(sizes, torch.bfloat16)
        loaded = {scheme: _load(module, infer, kind, scheme, *drawn, sizes["k"]) for scheme, kind in kinds.items()}
        del drawn
        if cores:
            _bind(cores)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    pipe.send("ready")
    prepared: dict[Any, list[tuple[torch.Tensor, ...]]] = {}
    estimate: dict[Any, float] = {}
    while (request := pipe.recv()) is not None:
        what, key, *values = request
        if what == "prepare":
            prepared[key] = [tuple(torch.from_numpy(value) for value in given) for given in values[0]]
            pipe.send(None)
            continue
        call = functools.partial(_run, infer, loaded[key[0]], prepared[key])
        if what == "call":
            result, estimate[key] = call(1)
            pipe.send(result.numpy())
            continue
        calls, spent = 0, 0.0
        # Until a batch was long enough: a first estimate may contain waiting.
        while spent < WHOLE / 2 and calls < TOGETHER:
            calls = max(values[0], min(TOGETHER, math.ceil(WHOLE / estimate[key])))
            estimate[key] = call(calls)[1]
            spent = calls * estimate[key]
        pipe.send(1e6 * estimate[key])
    sys.stderr.flush()
    os._exit(0)


def _bind(cores: Sequence[int]) -> None:
    """A core for every worker of the pool, by name; the others for all other threads."""
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    workers = [task for task in tasks if (task / "comm").read_text(encoding="utf-8").startswith("numa_")]
    for task in tasks:
        own = [cores[workers.index(task)]] if task in workers else cores[len(workers) :]
        os.sched_setaffinity(int(task.name), own)


def _run(infer: Any, layer: Any, routings: Sequence[tuple[torch.Tensor, ...]], calls: int) -> tuple[torch.Tensor, float]:
    """Output of the last of so many calls, and seconds per call."""
    out, last = torch.empty_like(routings[0][0]), torch.full_like(routings[0][0], _NAN)
    rows = torch.tensor([len(out)], dtype=torch.int32)
    start = time.perf_counter()
    for number, (x, share, ids) in enumerate(itertools.islice(itertools.cycle(routings), calls), 1):
        result = last if number == calls else out
        pointers = (ids.data_ptr(), share.data_ptr(), x.data_ptr(), result.data_ptr())
        infer.submit(layer.forward_task(rows.data_ptr(), ids.shape[1], *pointers, False))
    while calls > 1 and last[-1, -1] == _NAN:
        time.sleep(LOOK)
    infer.sync()
    return last, (time.perf_counter() - start) / calls


def _load(module: Any, infer: Any, kind: str, scheme: str, w13: torch.Tensor, w2: torch.Tensor, k: int) -> Any:
    experts, inner, D = w13.shape[0], w13.shape[1] // 2, w13.shape[2]
    config = module.moe.MOEConfig(experts, k, D, inner, 0)
    config.max_len, config.pool = LONGEST, infer.backend_
    weights = {"gate": w13[:, :inner].contiguous(), "up": w13[:, inner:].contiguous(), "down": w2}
    scales: dict[str, torch.Tensor] = {}
    if scheme == "int4_kgroup":
        weights, scales = ({name: _nibbles(w)[part] for name, w in weights.items()} for part in (0, 1))
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP, False
    for name, w in weights.items():
        if kind.startswith("AVX2"):
            # One list of experts for its only NUMA node.
            setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in w]])
            setattr(config, f"{name}_scales", [[expert.data_ptr() for expert in scales[name]] if scales else [0] * experts])
        else:
            setattr(config, f"{name}_proj", w.data_ptr())
    layer = getattr(module.moe, kind)(config)
    if kind.startswith("AVX2"):
        _KEPT.append((weights, scales))  # it multiplies them where they are
    places = torch.arange(experts)
    infer.submit(layer.load_weights_task(places.data_ptr()))
    infer.sync()
    return layer


def _nibbles(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of 4 bits with 8 added, two per byte along the rows, and a scale in bf16 for each group."""
    packed, scales = [], []
    for expert in w:
        groups = expert.float().unflatten(-1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
        whole = (groups / scale.float()).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(-2)
        packed.append(whole[..., 0::2] | whole[..., 1::2] << 4)
        scales.append(scale.squeeze(-1))
    return torch.stack(packed), torch.stack(scales)
