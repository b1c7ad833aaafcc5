"""Expert weights laid out for the kernels, once: schemes, layout, quantization, unpacking.

Layout version 1, the same on every CPU target. All data are 32-bit *words*, ``w13 [E, G, KD, 512]`` and ``w2 [E, ND, KI, 512]``.
A step of 512 words (2 KiB) covers 32 columns (rows of the weight matrices) and `STEP[scheme]` elements of the reduction axis,
which are padded with zeros to whole steps. w13's group g holds columns 16 g to 16 g + 16 of the gate, then those of the up
projection; w2's group n columns 32 n to 32 n + 32. The two halves of a step's columns follow one another; each is 16 lines of 16
words, one word per column; a word holds 1 (fp32), 2 (bf16, fp16) or 4 (int8) consecutive elements. This is the order in which
AMX reads its right operand and in which vdpbf16ps and vpdpbusd add pairs and quads. int4 has 32 lines of 16 words, a word holding
four elements of either half: of the first 16 columns in the low nibbles.

Integers are stored unsigned, with `ZERO` added; ``value = (stored - ZERO) * scale``. Scales ``[E, G, S, 32]`` stand in the order
of the columns; S = 1 (fp32, one scale per output channel) or one bf16 scale per `group` elements of the reduction axis.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from tvm_gdn import large_pages
from tvm_gdn.errors import ArgumentError, ArgumentTypeError

LAYOUT_VERSION = 1
#: Elements of the reduction axis per step.
STEP = {"fp32": 16, "bf16": 32, "fp16": 32, "int8": 64, "int4": 128, "int4_kgroup": 128}
#: What is added to stored integers.
ZERO = {"int8": 128, "int4": 8, "int4_kgroup": 8}
GROUPS = (32, 64, 128)
_FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Candidate scales of 4-bit weights, relative to what maps the largest element to the end of the range.
_CLIPS = tuple(1.12 - 0.06 * i for i in range(10))
#: Times that the best of them is refined.
_REFINED = 2
#: Groups of 32 rows that are laid out at once: what that takes beside the weights stays far below one expert.
_GROUPS = 4
#: Elements of 4-bit weights that are quantized at once, a hundred calls: threads that make many short ones wait for the
#: interpreter's lock most of the time.
_PIECE = 1 << 20


@dataclass(frozen=True)
class PackedExperts:
    """Expert weights in the kernels' layout; made by :func:`pack_experts`.

    Attributes
    ----------
    w13, w2 : torch.Tensor
        int32 words ``[E, G, KD, 512]`` and ``[E, ND, KI, 512]``.
    w13_scale, w2_scale : torch.Tensor or None
        Scales of quantized schemes.
    scheme : str
        A name of `STEP`.
    group : int
        Elements of the reduction axis per scale; 0 where a channel has one.
    hidden, intermediate : int
        D and I before padding.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    scheme: str
    group: int
    hidden: int
    intermediate: int

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.w13.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values() if tensor is not None)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors by name."""
        return {"w13": self.w13, "w2": self.w2, "w13_scale": self.w13_scale, "w2_scale": self.w2_scale}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; see `packed_experts_file.save`."""
        from tvm_gdn import packed_experts_file

        packed_experts_file.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], *, verify: bool = True) -> PackedExperts:
        """Read from a safetensors file; see `packed_experts_file.load`."""
        from tvm_gdn import packed_experts_file

        return packed_experts_file.load(path, verify=verify)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights as the kernels see them: fp32 w13 ``[E, 2I, D]`` and w2 ``[E, D, I]``."""
        w13 = unpack(self.w13, self.w13_scale, self.scheme)
        w2 = unpack(self.w2, self.w2_scale, self.scheme)
        experts, inner = w13.shape[0], w13.shape[1] // 2
        w13 = w13.view(experts, -1, 2, 16, w13.shape[2]).transpose(1, 2).reshape(experts, 2, inner, -1)
        w13 = w13[:, :, : self.intermediate, : self.hidden].reshape(experts, 2 * self.intermediate, self.hidden)
        return w13, w2[:, : self.hidden, : self.intermediate].contiguous()

    def __repr__(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return (
            f"PackedExperts({self.scheme}{group}, experts={self.experts}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, {self.nbytes / 1e6:.1f} MB)"
        )


def _ceil(n: int, to: int) -> int:
    return -(-n // to) * to


def shapes(scheme: str, group: int, experts: int, hidden: int, inner: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a pack."""
    step = STEP[scheme]
    padded_inner, padded_hidden = _ceil(inner, step), _ceil(hidden, step)
    groups, columns = padded_inner // 16, _ceil(hidden, 32) // 32
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "w13": ((experts, groups, padded_hidden // step, 512), torch.int32),
        "w2": ((experts, columns, padded_inner // step, 512), torch.int32),
    }
    if scheme in ZERO:
        dtype = torch.bfloat16 if group else torch.float32
        found["w13_scale"] = (experts, groups, padded_hidden // (group or padded_hidden), 32), dtype
        found["w2_scale"] = (experts, columns, padded_inner // (group or padded_inner), 32), dtype
    return found


def _quantize(w: torch.Tensor, scheme: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored integers (uint8) of rows ``[R, K]`` and their scales ``[R, S]``."""
    rows = w.float().view(w.shape[0], -1, group or w.shape[1])
    if scheme == "int8":
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return ((rows / scale.where(scale > 0, 1)).round() + 128).to(torch.uint8).view(w.shape), scale.squeeze(-1)
    stored_as = torch.bfloat16 if group else torch.float32
    scratch = torch.empty_like(rows), torch.empty_like(rows)
    scale = _best_scale(rows, stored_as, scratch)
    codes = _rounded(rows, scale, scratch[0]).add_(8).to(torch.uint8).view(w.shape)
    return codes, scale.squeeze(-1).to(stored_as)


def _best_scale(rows: torch.Tensor, stored_as: torch.dtype, scratch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Scales ``[R, S, 1]`` of 4-bit integers for rows ``[R, S, group]``; `scratch` is like them.

    The range is -8 to 7: the largest element gets the -8, by a negative scale if it is positive. A smaller scale clips a few
    large elements and serves the others better: the candidate of the least square error wins. The integers that it leads to have
    a best scale of their own, ``<row, q> / <q, q>``; two such steps come within 0.3 % of the error of the best scale there is.
    """
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    candidates = (torch.tensor(_CLIPS).view(-1, 1, 1, 1) * (largest / -8)).to(stored_as).float()
    errors = torch.stack([_square_error(rows, candidate, scratch[0]) for candidate in candidates])
    best, which = errors.min(0, keepdim=True)
    best, scale = best[0], candidates.gather(0, which)[0]
    for _ in range(_REFINED):
        q = _rounded(rows, scale, scratch[0])
        product = torch.mul(rows, q, out=scratch[1]).sum(-1, keepdim=True)
        candidate = (product / q.square_().sum(-1, keepdim=True).clamp_(min=1)).to(stored_as).float()
        error = _square_error(rows, candidate, scratch[0])
        better = error < best
        best, scale = error.where(better, best), candidate.where(better, scale)
    return scale


def _square_error(rows: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return _rounded(rows, scale, out).mul_(scale).sub_(rows).square_().sum(-1, keepdim=True)


def _rounded(rows: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """4-bit integers nearest to rows in steps of the scale, as fp32, in `out`."""
    return torch.mul(rows, 1 / scale.where(scale != 0, 1), out=out).round_().clamp_(-8, 7)


def _words(elements: torch.Tensor, scheme: str) -> torch.Tensor:
    """Words ``[groups, steps, 512]`` of rows ``[groups * 32, K]`` that are padded already and in the order of the columns."""
    step = STEP[scheme]
    groups, steps = elements.shape[0] // 32, elements.shape[1] // step
    if scheme in {"int4", "int4_kgroup"}:
        both = elements.view(groups, 2, 16, steps, 32, 4).permute(1, 0, 3, 4, 2, 5)  # half, group, step, line, column, element
        elements = both[0] | (both[1] << 4)
    else:
        elements = elements.view(groups, 2, 16, steps, 16, step // 16).permute(0, 3, 1, 4, 2, 5)
    return elements.contiguous().view(groups, steps, -1).view(torch.int32)


def unpack(words: torch.Tensor, scale: torch.Tensor | None, scheme: str) -> torch.Tensor:
    """The fp32 rows ``[E, groups * 32, K]`` that words hold, in the order of the columns of the groups."""
    experts, groups, steps, _ = words.shape
    step = STEP[scheme]
    if scheme in {"int4", "int4_kgroup"}:
        packed = words.contiguous().view(torch.uint8).view(experts, groups, steps, 32, 16, 4)
        both = torch.stack([packed & 15, packed >> 4], 2)  # expert, group, half, step, line, column, element
        rows = both.permute(0, 1, 2, 5, 3, 4, 6).reshape(experts, groups * 32, steps * step)
    else:
        dtype = _FLOAT.get(scheme, torch.uint8)
        values = words.contiguous().view(dtype).view(experts, groups, steps, 2, 16, 16, step // 16)
        rows = values.permute(0, 1, 3, 5, 2, 4, 6).reshape(experts, groups * 32, steps * step)
    if scale is None:
        return rows.float()
    count = scale.shape[2]
    factors = scale.float().transpose(2, 3).reshape(experts, groups * 32, count)
    rows = (rows.float() - ZERO[scheme]).view(experts, groups * 32, count, steps * step // count)
    return (rows * factors[..., None]).view(experts, groups * 32, steps * step)


def _pack_rows(rows: torch.Tensor, scheme: str, group: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Words, and scales ``[groups, S, 32]`` if any, of padded rows ``[groups * 32, K]``."""
    if scheme in _FLOAT:
        return _words(rows.to(_FLOAT[scheme]), scheme), None
    stored, scale = _quantize(rows, scheme, group)
    return _words(stored, scheme), scale.view(rows.shape[0] // 32, 32, -1).transpose(1, 2).contiguous()


def _gate_up_rows(gate: torch.Tensor, up: torch.Tensor, first: int, last: int, padded: int) -> torch.Tensor:
    """Padded rows of groups `first` to `last` of one expert's first product: 16 rows of each ``[I, D]`` in turn."""
    rows = gate.new_zeros(2, (last - first) * 16, padded)
    for half, weights in zip(rows, (gate, up), strict=True):
        part = weights[first * 16 : last * 16]
        half[: part.shape[0], : part.shape[1]] = part
    return rows.view(2, last - first, 16, padded).transpose(0, 1).reshape(-1, padded)


def _down_rows(w2: torch.Tensor, first: int, last: int, padded: int) -> torch.Tensor:
    """Padded rows of groups `first` to `last` of one expert's ``[D, I]``: 32 each."""
    part = w2[first * 32 : last * 32]
    rows = w2.new_zeros((last - first) * 32, padded)
    rows[: part.shape[0], : part.shape[1]] = part
    return rows


def _check(w13: torch.Tensor, w2: torch.Tensor, scheme: str, group: int) -> None:
    for name, tensor in (("w13", w13), ("w2", w2)):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(f"pack_experts: {name} is a {type(tensor).__name__}; pass a torch.Tensor")
        if tensor.dtype not in _FLOAT.values():
            raise ArgumentTypeError(f"pack_experts: {name} has dtype {tensor.dtype}; allowed: fp32, bf16, fp16")
        if tensor.ndim != 3:
            raise ArgumentError(f"pack_experts: {name} has {tensor.ndim} axes; w13 is [E, 2I, D], w2 is [E, D, I]")
    (experts, two_inner, hidden), expected = w13.shape, w2.shape
    if expected != (experts, hidden, two_inner // 2) or two_inner % 2:
        raise ArgumentError(
            f"pack_experts: w13 is {tuple(w13.shape)} and w2 {tuple(w2.shape)}; with w13 [E, 2I, D], w2 must be [E, D, I]"
        )
    if min(experts, hidden, two_inner) == 0:
        raise ArgumentError("pack_experts: there is nothing to pack in weights without elements")
    if scheme not in STEP:
        raise ArgumentError(f"pack_experts: scheme is {scheme!r}; allowed: {', '.join(STEP)}")
    if scheme == "int4_kgroup" and group not in GROUPS:
        raise ArgumentError(f"pack_experts: group is {group}; allowed: {', '.join(map(str, GROUPS))}")


def pack_experts(
    w13: torch.Tensor,
    w2: torch.Tensor,
    scheme: str = "bf16",
    *,
    group: int = 32,
    in_place: bool = False,
    progress: bool = True,
    jobs: int = 0,
) -> PackedExperts:
    """Lay out, and quantize if asked, the weights of all experts for the compiled kernels; done once.

    Parameters
    ----------
    w13 : torch.Tensor
        ``[E, 2I, D]``, fp32, bf16 or fp16: gate rows, then up rows.
    w2 : torch.Tensor
        ``[E, D, I]``.
    scheme : {"bf16", "fp16", "fp32", "int8", "int4", "int4_kgroup"}
        Storage. int8 and int4 have one scale per output channel; int4_kgroup one per `group` elements of the reduction axis.
    group : {32, 64, 128}
        For int4_kgroup.
    in_place : bool
        Write the packed data over the memory of `w13` and `w2`, whose contents are lost: the peak of additional memory is one
        expert's. Needs contiguous tensors, and packed data that are no larger.
    progress : bool
        Show a progress bar on stderr if that is a terminal.
    jobs : int
        Threads; default one per torch thread. In place one expert is packed at a time.

    Returns
    -------
    packed : PackedExperts
        The weights of all experts, `scheme` and scales.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shapes, dtypes, an unknown scheme or group, or weights that cannot be packed in place.

    Notes
    -----
    Scales per output channel with activations quantized by row at run time: LLM.int8() (arXiv:2208.07339).
    """
    _check(w13, w2, scheme, group)
    group = group if scheme == "int4_kgroup" else 0
    with torch.no_grad():
        return _pack(w13.detach(), w2.detach(), scheme, group, in_place, progress, jobs or torch.get_num_threads())


def _destination(source: torch.Tensor, shape: tuple[int, ...], name: str, in_place: bool) -> torch.Tensor:
    if not in_place:
        return large_pages.empty(shape, torch.int32)
    count = torch.Size(shape).numel()
    if not source.is_contiguous() or count * 4 > source.nbytes:
        raise ArgumentError(
            f"pack_experts: {name} cannot be packed in place: it must be contiguous and have at least {count * 4} bytes, it has "
            f"{source.nbytes}; pass in_place=False"
        )
    return source.view(-1).view(torch.int32)[:count].view(shape)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Meanwhile torch's operations run on `count` threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pack(
    w13: torch.Tensor, w2: torch.Tensor, scheme: str, group: int, in_place: bool, progress: bool, jobs: int
) -> PackedExperts:
    experts, hidden, inner = w2.shape
    wanted = shapes(scheme, group, experts, hidden, inner)
    words13 = _destination(w13, wanted["w13"][0], "w13", in_place)
    words2 = _destination(w2, wanted["w2"][0], "w2", in_place)
    scale13, scale2 = (large_pages.empty(*wanted[name]) if name in wanted else None for name in ("w13_scale", "w2_scale"))

    def pack_one(expert: int) -> None:
        gate, up = w13[expert].view(2, inner, hidden)
        # In place, words overwrite weights that were read for groups before; but gate rows stand before all up rows.
        gate = gate.clone() if in_place else gate
        for rows, words, scale, padded in (
            (partial(_gate_up_rows, gate, up), words13, scale13, _ceil(hidden, STEP[scheme])),
            (partial(_down_rows, w2[expert]), words2, scale2, _ceil(inner, STEP[scheme])),
        ):
            together = max(_GROUPS, _PIECE // (32 * padded)) if ZERO.get(scheme) == 8 and not in_place else _GROUPS
            for start in range(0, words.shape[1], together):
                stop = min(start + together, words.shape[1])
                part, factors = _pack_rows(rows(start, stop, padded), scheme, group)
                words[expert, start:stop] = part
                if scale is not None and factors is not None:
                    scale[expert, start:stop] = factors

    bar: Callable[..., Any] = lambda it: tqdm(it, total=experts, desc=f"pack {scheme}", disable=None if progress else True)  # noqa: E731
    if in_place or jobs == 1:
        with _torch_threads(jobs):
            for expert in bar(range(experts)):
                pack_one(expert)
    else:
        # Teams of their own would share the same cores.
        with _torch_threads(1), ThreadPoolExecutor(jobs) as pool:
            for _ in bar(pool.map(pack_one, range(experts))):
                pass
    return PackedExperts(words13, words2, scale13, scale2, scheme, group, hidden, inner)
