"""``tvm_gdn demo``: greedy decoding of a small Qwen3-Next with and without tvm_gdn, then the decode step at full size.

The model is built from transformers' own configuration class with random weights of a fixed seed: no download.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch

from tvm_gdn.commands.arguments import geometry_of_case
from tvm_gdn.commands.text import as_json, emit
from tvm_gdn.errors import ArgumentError, TvmGdnError
from tvm_gdn.ops import OPS
from tvm_gdn.spec import Geometry

__all__ = ["main", "run"]

# Read as bytes, one byte per token: ids in 0..255, inside the small model's vocabulary.
PROMPT = "A state of fixed size is decayed, corrected by the delta rule, and read once per token."

# The gated delta net layer of Qwen3-Next-80B-A3B.
FULL_SIZE = {"H": 16, "HV": 32, "K": 128, "V": 128}
BATCHES = (1, 8)
_CONFIG = {
    "H": "linear_num_key_heads", "HV": "linear_num_value_heads", "K": "linear_key_head_dim", "V": "linear_value_head_dim",
    "W": "linear_conv_kernel_dim", "L": "linear_conv_kernel_dim",
}  # fmt: skip

#: A patched model's decode step of one sequence, and the recurrence of the timed layer, whose gates are given.
DECODE = "fused_conv_gated_delta_rule_update"
UPDATE = "fused_recurrent_gated_delta_rule_update"

ServedBy = Callable[[str, Geometry], str]


class _Decoded(NamedTuple):
    tokens: list[int]
    logits: torch.Tensor  # [tokens, vocabulary], those from which the tokens were chosen
    ms_per_token: float


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence its advice to install other kernels: the unpatched model is the reference here."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(verbosity)


def _build_model() -> torch.nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        # Wider than the published 0.02: with it, random weights give logits of unit scale and tokens that vary.
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = Qwen3NextForCausalLM(config)
    return model.float().eval()


def _prompt(length: int) -> torch.Tensor:
    ids = PROMPT.encode()
    return torch.tensor([[ids[i % len(ids)] for i in range(length)]])


@torch.no_grad()
def _decode_greedily(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> _Decoded:
    output = model(prompt, use_cache=True)
    # transformers up to 5.23 has the second name.
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits = [output.logits[0, -1]]
    chosen = [int(logits[0].argmax())]
    seconds = []
    while len(chosen) < tokens:
        token = torch.tensor([[chosen[-1]]])
        start = time.perf_counter()
        output = model(token, **{cache: getattr(output, cache)}, use_cache=True)
        seconds.append(time.perf_counter() - start)
        logits.append(output.logits[0, -1])
        chosen.append(int(logits[-1].argmax()))
    return _Decoded(chosen, torch.stack(logits), 1e3 * median(seconds))


def _geometry(op: str, sizes: dict[str, int]) -> Geometry:
    """Geometry of a decode step in float32, its state updated in place."""
    case = {**sizes, "B": 1, "T": 1, "S": 1, "dtype": "float32", "with": ("initial_state_source",)}
    return geometry_of_case(OPS[op], case)


def _compare_models(tokens: int, prompt_tokens: int, served_by: ServedBy) -> dict[str, Any]:
    from tvm_gdn.integrations.transformers import patch

    model, prompt = _build_model(), _prompt(prompt_tokens)
    # Two tokens are one decode step: what compiles or loads at the first call must not count as time per token.
    _decode_greedily(model, prompt, 2)
    stock = _decode_greedily(model, prompt, tokens)
    with patch(model) as patched:
        _decode_greedily(model, prompt, 2)
        ours = _decode_greedily(model, prompt, tokens)
        sizes = {axis: getattr(model.config, name) for axis, name in _CONFIG.items()}
        served = served_by(DECODE, _geometry(DECODE, sizes))
    return {
        "prompt_tokens": prompt_tokens,
        "patched_layers": list(patched.layers),
        "served_by": served,
        "tokens": ours.tokens,
        "tokens_transformers": stock.tokens,
        "tokens_equal": ours.tokens == stock.tokens,
        "max_abs_logit_difference": float((ours.logits - stock.logits).abs().max()),
        "max_abs_logit": float(stock.logits.abs().max()),
        "ms_per_token": {"tvm_gdn": ours.ms_per_token, "transformers": stock.ms_per_token},
    }


def _median_us(calls: Sequence[Callable[[], object]], seconds: float, rounds: int = 5) -> list[float]:
    """Median of each call, timed in turns so that other load on the machine falls on all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, samples, strict=True):
            call()
            end = time.perf_counter() + seconds / rounds
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                times.append(now - start)
                if now > end:
                    break
    return [1e6 * median(times) for times in samples]


@torch.no_grad()
def _time_decode_step(batch: int, seconds: float, served_by: ServedBy) -> dict[str, Any]:
    """Time one token per sequence at :data:`FULL_SIZE`, float32, state [batch, HV, K, V] updated in place."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    import tvm_gdn

    # Without its wrapper, which would hand the call to another package where one is installed.
    reference = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
    h, hv, k, v = FULL_SIZE.values()
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(batch, 1, h, k, generator=random) for _ in range(2))
    value = torch.randn(batch, 1, hv, v, generator=random)
    # So slow a decay that thousands of timed steps leave no denormal numbers, which would slow down either side.
    g = -1e-4 * torch.rand(batch, 1, hv, generator=random)
    beta = torch.rand(batch, 1, hv, generator=random)
    state = torch.randn(batch, hv, k, v, generator=random)
    operands = (query, key, value, g, beta)

    def stock() -> Any:
        return reference(*operands, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    def ours() -> torch.Tensor:
        return tvm_gdn.fused_recurrent_gated_delta_rule_update(
            *operands, initial_state_source=state, use_qk_l2norm_in_kernel=True
        )

    expected, expected_state = stock()
    difference = max(float((ours() - expected).abs().max()), float((state - expected_state).abs().max()))
    transformers_us, ours_us = _median_us((stock, ours), seconds)
    return {
        "batch": batch,
        **FULL_SIZE,
        "served_by": served_by(UPDATE, _geometry(UPDATE, FULL_SIZE)),
        "max_abs_difference": difference,
        "tvm_gdn_us": ours_us,
        "transformers_us": transformers_us,
        "ratio": transformers_us / ours_us,
    }


def run(tokens: int = 32, prompt_tokens: int = 24, *, seconds: float = 1.0, served_by: ServedBy | None = None) -> dict[str, Any]:
    """Decode with and without tvm_gdn, then time the decode step at the published layer's size.

    Parameters
    ----------
    tokens : int
        Tokens to generate, at least 2 (the first comes from the prefill).
    prompt_tokens : int
        Length of the prompt, at least 1.
    seconds : float
        Time to spend on each timed function.
    served_by : callable, optional
        Maps an operator's name and a geometry to what serves it. Default: ``tvm_gdn.dispatch.served_by``.

    Returns
    -------
    dict
        Ready for JSON: ``versions``, ``threads``, ``decode`` (tokens of both, ``tokens_equal``, the largest difference
        of the logits, milliseconds per token) and ``layer``, one entry per batch size with median microseconds.

    Raises
    ------
    ArgumentError
        A count is too small.
    TvmGdnError
        transformers is not installed, or too old to have Qwen3-Next.
    """
    if tokens < 2:
        raise ArgumentError(f"tokens: got {tokens}; at least 2 are needed, since the first one comes from the prefill")
    if prompt_tokens < 1:
        raise ArgumentError(f"prompt_tokens: got {prompt_tokens}; at least 1 is needed")
    if served_by is None:
        from tvm_gdn import dispatch

        served_by = dispatch.served_by
    try:
        importlib.import_module("transformers.models.qwen3_next")
    except ImportError as error:
        raise TvmGdnError(
            f"the demo needs transformers with Qwen3-Next ({error}): install the extra, pip install 'tvm_gdn[models]'"
        ) from error

    with _quiet_transformers():
        decode = _compare_models(tokens, prompt_tokens, served_by)
        layer = [_time_decode_step(batch, seconds, served_by) for batch in BATCHES]
    import transformers

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "decode": decode,
        "layer": layer,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    decode, time_per_token = result["decode"], result["decode"]["ms_per_token"]
    verdict = "equal to" if decode["tokens_equal"] else "DIFFERENT from"
    lines = [
        f"Small random Qwen3-Next, greedy, fp32: {decode['prompt_tokens']} prompt ids, {len(decode['tokens'])} new"
        f" tokens, {len(decode['patched_layers'])} Gated DeltaNet layers patched, {result['threads']} threads",
        f"  tokens        {verdict} the unpatched model's: {' '.join(map(str, decode['tokens']))}",
    ]
    if not decode["tokens_equal"]:
        lines.append(f"  unpatched     {' '.join(map(str, decode['tokens_transformers']))}")
    shape = " ".join(f"{name} {size}" for name, size in FULL_SIZE.items())
    lines += [
        f"  logits        max abs difference {decode['max_abs_logit_difference']:.1e}"
        f" (largest logit {decode['max_abs_logit']:.2f})",
        f"  ms per token  tvm_gdn {time_per_token['tvm_gdn']:.2f}, transformers {time_per_token['transformers']:.2f}"
        " (median, whole model)",
        f"  served by     {decode['served_by']}",
        f"One decode step of the 80B model's layer ({shape}), fp32 state in place, median:",
    ]
    for row in result["layer"]:
        lines.append(
            f"  batch {row['batch']:<3} tvm_gdn {row['tvm_gdn_us']:.0f} us, transformers"
            f" {row['transformers_us']:.0f} us, ratio {row['ratio']:.1f},"
            f" max abs difference {row['max_abs_difference']:.1e}; {row['served_by']}"
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--prompt-tokens", type=int, default=24, metavar="N", help="length of the prompt (default 24)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the demo with the command line's ``tokens``, ``prompt_tokens`` and ``json``; return the exit status.

    Returns
    -------
    int
        0 if the tokens with tvm_gdn equal those without, else 1.
    """
    result = run(args.tokens, args.prompt_tokens)
    emit(as_json(result) if args.json else "\n".join(_lines(result)))
    if not result["decode"]["tokens_equal"]:
        logging.getLogger("tvm_gdn").error("the patched model chose other tokens than the unpatched one")
        return 1
    return 0
