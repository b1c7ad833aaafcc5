"""The experts of a mixture: specifications and public functions, on raw and on packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tvm_gdn import direct
from tvm_gdn.autograd import in_words_of
from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.ops import draws
from tvm_gdn.ops.moe import IDS, sizes
from tvm_gdn.packed_experts import GROUPS, STEP, PackedExperts, unpack
from tvm_gdn.spec import FLOATS, ITEMSIZE, Draw, Geometry, OpSpec, Output, Scalar, Tensor

ACTIVATION = Scalar("activation", "str", "silu", static=True, choices=(("silu", "silu"), ("swish", "silu")))
_FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _weights(draw: Draw) -> torch.Tensor:
    return torch.randn(draw.shape, generator=draw.rng) * draw.shape[-1] ** -0.5


def _packed_sizes(case: Mapping[str, Any]) -> dict[str, int]:
    """Sizes in steps of the scheme, from D and I; one scale per channel or per 32 elements."""
    found, step = sizes(case), STEP[case.get("scheme", "bf16")]
    hidden, inner = -(-found.get("D", 1) // step) * step, -(-found.get("I", 1) // step) * step
    group = case.get("group", 32) if case.get("scheme") == "int4_kgroup" else 0
    return found | {
        "G": inner // 16,
        "KD": hidden // step,
        "ND": -(-found.get("D", 1) // 32),
        "KI": inner // step,
        "S13": hidden // group if group else 1,
        "S2": inner // group if group else 1,
    }


def _words(draw: Draw) -> torch.Tensor:
    """Words of normal weights, or of random integers."""
    scheme = draw.case.get("scheme", "bf16")
    if scheme in _FLOAT:
        per_word = 4 // _FLOAT[scheme].itemsize
        shape = (*draw.shape[:-1], draw.shape[-1] * per_word)
        values = torch.randn(shape, generator=draw.rng) * (draw.shape[2] * STEP[scheme]) ** -0.5
        return values.to(_FLOAT[scheme]).view(torch.int32)
    return torch.randint(1, 256, (*draw.shape, 4), dtype=torch.uint8, generator=draw.rng).view(torch.int32).squeeze(-1)


def _scales(draw: Draw) -> torch.Tensor:
    """Scales that make normal weights of the integers' spread."""
    step, spread = STEP[draw.case["scheme"]], 74 if draw.case["scheme"] == "int8" else 4.6
    depth = draw.sizes["KD" if draw.shape[1] == draw.sizes["G"] else "KI"] * step
    return (0.5 + torch.rand(draw.shape, generator=draw.rng)) / spread * depth**-0.5


def _touched(found: Mapping[str, int]) -> int:
    """Experts that a random routing touches, on average."""
    share = found.get("k", 1) / found["E"]
    return max(1, round(found["E"] * (1 - (1 - share) ** found["T"])))


def _cost(found: Mapping[str, int], geometry: Geometry) -> tuple[int, int]:
    """Floor: the weights of the experts that are expected to be touched, once; x and the output once."""
    hidden, inner = found["D"], found["I"] if "I" in found else found["G"] * 16
    if "w13_scale" in geometry.dtype:
        scales = found["G"] * found["S13"] * 32 + found["ND"] * found["S2"] * 32
        each = (found["G"] * found["KD"] + found["ND"] * found["KI"]) * 2048 + scales * ITEMSIZE[geometry.dtype["w13_scale"]]
    elif "KD" in found:
        each = (found["G"] * found["KD"] + found["ND"] * found["KI"]) * 2048
    else:
        each = 3 * hidden * inner * ITEMSIZE[geometry.dtype["w13"]]
    rows = 2 * found["T"] * hidden * ITEMSIZE[geometry.dtype["x"]]
    return _touched(found) * each + rows, found["T"] * found.get("k", 1) * 6 * hidden * inner


def _check_packed(args: Mapping[str, Any], found: Mapping[str, int]) -> None:
    scheme, step = args["scheme"], STEP[args["scheme"]]
    hidden = found["D"]
    if found["KD"] != -(-hidden // step) or found["ND"] != -(-hidden // 32):
        raise ArgumentError(
            f"w13 and w2 hold {found['KD']} steps and {found['ND']} groups of the hidden axis; x has D = {hidden}, for which "
            f"{scheme} has {-(-hidden // step)} and {-(-hidden // 32)}: pass x of the width that was packed"
        )
    if found["G"] * 16 != found["KI"] * step:
        raise ArgumentError(f"w13 has {found['G'] * 16} columns and w2 reduces {found['KI'] * step}: they are not of one pack")
    for name, count, elements in (("w13", found.get("S13"), found["KD"] * step), ("w2", found.get("S2"), found["KI"] * step)):
        allowed = {1} if scheme != "int4_kgroup" else {elements // group for group in GROUPS}
        if count is not None and count not in allowed:
            raise ArgumentError(
                f"{name}_scale has {count} scales per channel; {scheme} has {sorted(allowed)} for {elements} elements"
            )


def _unpacked(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of the reference: dense weights in place of words."""
    w13 = unpack(args["w13"], args.get("w13_scale"), args["scheme"])
    experts, rows, hidden = w13.shape
    w13 = w13.view(experts, rows // 32, 2, 16, hidden).transpose(1, 2).reshape(experts, rows, hidden)
    kept = {name: args[name] for name in ("x", "topk_weights", "topk_ids", "activation")}
    return {**kept, "w13": w13, "w2": unpack(args["w2"], args.get("w2_scale"), args["scheme"])}


_X = Tensor("x", "T D", role="data")
_TOPK = (Tensor("topk_weights", "T k", strides="any", usual="float32", values=draws.strength), IDS)
_OUT = (Output("out", "T D", like="data"),)

FUSED_EXPERTS = OpSpec(
    name="fused_experts",
    summary="experts of a mixture: gate-up, SiLU, down, weighted sum",
    algorithm="moe_experts",
    inputs=(
        _X,
        Tensor("w13", "E 2*I D", role="data", strides="dense", values=_weights),
        Tensor("w2", "E D I", role="data", strides="dense", values=_weights),
        *_TOPK,
        ACTIVATION,
    ),
    outputs=_OUT,
    static_axes=("D", "I"),
    cases=(
        {"T": 65, "k": 3, "E": 7, "D": 96, "I": 40, "dtype": "float32", "padding": True},
        {"T": 63, "k": 2, "E": 5, "D": 51, "I": 33, "dtype": "bfloat16"},
        {"T": 500, "k": 4, "E": 9, "D": 128, "I": 64, "dtype": "bfloat16", "padding": True},
        {"T": 65, "k": 2, "E": 6, "D": 100, "I": 72, "dtype": "float16"},
    ),
    bench=tuple({"T": tokens, "k": 8, "E": 32, "D": 2048, "I": 768, "dtype": "bfloat16"} for tokens in (1, 16, 128, 1024)),
    sizes=sizes,
    smallest={"D": 4, "I": 4},
    cost=_cost,
)

_BENCH = {"k": 8, "D": 2048, "I": 768, "dtype": "bfloat16"}

_FLOATING = tuple(_FLOAT)
_QUANTIZED = tuple(name for name in STEP if name not in _FLOAT)


def _packed(name: str, summary: str, schemes: tuple[str, ...], scales: bool, **rest: Any) -> OpSpec:
    def scale(of: str, axes: str) -> tuple[Tensor, ...]:
        return (Tensor(of, axes, role="scale", dtypes=FLOATS[:2], strides="dense", values=_scales),) if scales else ()

    return OpSpec(
        name=name,
        summary=summary,
        algorithm="moe_experts",
        inputs=(
            _X,
            Tensor("w13", "E G KD 512", dtypes=("int32",), strides="dense", values=_words),
            Tensor("w2", "E ND KI 512", dtypes=("int32",), strides="dense", values=_words),
            *_TOPK,
            *scale("w13_scale", "E G S13 32"),
            *scale("w2_scale", "E ND S2 32"),
            Scalar("scheme", "str", schemes[0], static=True, choices=tuple((choice, choice) for choice in schemes)),
            ACTIVATION,
        ),
        outputs=_OUT,
        static_axes=("D", "G", "KD", "ND", "KI", *(("S13", "S2") if scales else ())),
        sizes=_packed_sizes,
        shaping=("I", "group", "scale_dtype"),
        # The smallest call of 32 columns and one step of the default scheme.
        smallest={"D": 16, "G": STEP[schemes[0]] // 16},
        check=_check_packed,
        cost=_cost,
        reference_arguments=_unpacked,
        **rest,
    )


FUSED_EXPERTS_PACKED = _packed(
    "fused_experts_packed",
    "fused_experts on packed weights",
    _FLOATING,
    False,
    cases=(
        {"T": 65, "k": 3, "E": 7, "D": 96, "I": 40, "dtype": "bfloat16", "scheme": "bf16", "padding": True},
        {"T": 500, "k": 4, "E": 9, "D": 100, "I": 64, "dtype": "bfloat16", "scheme": "bf16"},
        {"T": 63, "k": 2, "E": 5, "D": 51, "I": 33, "dtype": "float32", "scheme": "bf16"},
        {"T": 65, "k": 2, "E": 5, "D": 64, "I": 48, "dtype": "float32", "scheme": "fp32"},
        {"T": 65, "k": 2, "E": 6, "D": 100, "I": 72, "dtype": "float16", "scheme": "fp16"},
    ),
    bench=tuple({"T": tokens, "E": 32, **_BENCH, "scheme": "bf16"} for tokens in (1, 16, 1024)),
)

FUSED_EXPERTS_QUANTIZED = _packed(
    "fused_experts_quantized",
    "fused_experts on int8 or int4 weights, rows quantized on the way",
    _QUANTIZED,
    True,
    cases=tuple(
        {"T": tokens, "k": 3, "E": 7, "D": hidden, "I": 200, "dtype": dtype, "scheme": scheme,
         "scale_dtype": "bfloat16" if scheme == "int4_kgroup" else "float32"}
        for scheme in _QUANTIZED
        for tokens, hidden, dtype in ((65, 300, "bfloat16"), (63, 256, "float32"))
    ),
    bench=tuple(
        {"T": tokens, "E": 32, **_BENCH, "scheme": scheme, "scale_dtype": "bfloat16" if scheme == "int4_kgroup" else "float32"}
        for scheme in _QUANTIZED
        for tokens in (1, 16, 1024)
    ),
    # The reference has the intermediate in float64: one of its numbers on the border of two integers may go either way.
    tolerance={"float32": 2e-3, "float16": 3e-3, "bfloat16": 5e-3},
)  # fmt: skip

SPECS = (FUSED_EXPERTS, FUSED_EXPERTS_PACKED, FUSED_EXPERTS_QUANTIZED)


def _run_pack(
    x: torch.Tensor, pack: PackedExperts, topk_weights: torch.Tensor | None, topk_ids: torch.Tensor | None, activation: str
) -> torch.Tensor:
    if pack.w13_scale is None:
        return direct.call.fused_experts_packed(x, pack.w13, pack.w2, topk_weights, topk_ids, pack.scheme, activation)
    return direct.call.fused_experts_quantized(
        x, pack.w13, pack.w2, topk_weights, topk_ids, pack.w13_scale, pack.w2_scale, pack.scheme, activation
    )


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor | PackedExperts,
    w2: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Run every token through its experts and add up the results: ``sum_j weights[t, j] * down(silu(gate x) * up x)``.

    Parameters
    ----------
    x : torch.Tensor
        ``[T, D]``, fp32, bf16 or fp16; rows may be strided.
    w13 : torch.Tensor or PackedExperts
        ``[E, 2I, D]`` of the dtype of `x`: gate rows, then up rows. Or a pack, in place of `w13` and `w2`.
    w2 : torch.Tensor, optional
        ``[E, D, I]``; not with a pack.
    topk_weights : torch.Tensor
        ``[T, k]``, fp32, bf16 or fp16.
    topk_ids : torch.Tensor
        ``[T, k]``, int32 or int64. Ids that are negative or >= E are padding and contribute nothing.
    activation : {"silu", "swish"}
        Two names of one function.

    Returns
    -------
    torch.Tensor
        ``[T, D]``, dtype of `x`. Summed in fp32, in ascending order of the experts on CPUs and of the choices on devices: the
        same numbers whatever the number of threads.

    Raises
    ------
    ArgumentError
        Shapes or an activation that do not fit.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    fp32 activations are multiplied in fp32; bf16 ones by bf16 dot products where the target has them, with fp32 sums. With int8
    and int4 packs the rows of `x` and of the intermediate are quantized to int8, each by its own largest element
    (``x * (127 / largest)`` in fp32, to the nearest integer, ties to even), and integer dot products do the work. A row with
    NaN or an infinity gives NaN. Source: sparse mixtures (arXiv:1701.06538), SwiGLU (arXiv:2002.05202).
    """
    if isinstance(w13, PackedExperts):
        if w2 is not None:
            raise ArgumentError("fused_experts: a pack holds both weights; pass topk_weights and topk_ids by name")
        try:
            return in_words_of("fused_experts", _run_pack(x, w13, topk_weights, topk_ids, activation))
        except (ArgumentError, ArgumentTypeError) as error:
            # In the words of the function that was called.
            raise type(error)(f"fused_experts:{str(error).partition(':')[2]}") from None
    return direct.call.fused_experts(x, w13, w2, topk_weights, topk_ids, activation)


def shared_expert(
    x: torch.Tensor,
    w13: torch.Tensor | PackedExperts,
    w2: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """Run every token through one expert: ``sigmoid(gate x) * down(silu(gate_proj x) * up x)``.

    Parameters
    ----------
    x : torch.Tensor
        ``[T, D]``, fp32, bf16 or fp16.
    w13 : torch.Tensor or PackedExperts
        ``[2I, D]``: gate rows, then up rows. Or a pack of one expert, in place of `w13` and `w2`.
    w2 : torch.Tensor, optional
        ``[D, I]``; not with a pack.
    gate : torch.Tensor, optional
        ``[D]`` or ``[1, D]``: every token's output is multiplied with the sigmoid of its product with this.
    activation : {"silu", "swish"}
        Two names of one function.

    Returns
    -------
    torch.Tensor
        ``[T, D]``, dtype of `x`.

    Raises
    ------
    ArgumentError
        Shapes or an activation that do not fit.
    ArgumentTypeError
        A dtype or device that is not allowed.

    Notes
    -----
    The kernel of `fused_experts`, with one expert that every token chooses. Source: DeepSeekMoE
    (arXiv:2401.06066); the gate is Qwen3-Next's.
    """
    if isinstance(w13, PackedExperts):
        if w13.experts != 1:
            raise ArgumentError(f"shared_expert: w13 is a pack of {w13.experts} experts; pass a pack of one")
        weights: tuple[Any, Any] = (w13, w2)
    else:
        if not all(isinstance(weight, torch.Tensor) and weight.ndim == 2 for weight in (w13, w2)):
            raise ArgumentError("shared_expert: w13 is [2I, D] and w2 [D, I], or w13 a PackedExperts of one expert")
        weights = w13[None], w2[None]  # type: ignore[index]
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise ArgumentError(f"shared_expert: x is {tuple(x.shape) if isinstance(x, torch.Tensor) else x!r}; allowed: [T, D]")
    tokens, hidden = x.shape
    if gate is not None and not isinstance(gate, torch.Tensor):
        raise ArgumentTypeError(f"shared_expert: gate is a {type(gate).__name__}; pass a torch.Tensor or None")
    if gate is not None and gate.numel() != hidden:
        raise ArgumentError(f"shared_expert: gate has {gate.numel()} elements; it must have D = {hidden}")
    if gate is None:
        share = x.new_ones(tokens, 1, dtype=torch.float32)
    else:
        share = torch.sigmoid((x @ gate.view(-1, 1).to(x.dtype)).float())
    return fused_experts(
        x, *weights, topk_weights=share, topk_ids=x.new_zeros(tokens, 1, dtype=torch.int32), activation=activation
    )
