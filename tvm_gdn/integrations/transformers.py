"""Serve the Gated DeltaNet layers of a transformers model with tvm_gdn's operators.

Between its projections a layer's ``forward`` calls functions of its modeling module (convolution and recurrence, for a prompt and
for a cached single-token step) and a gated norm. :func:`patch` puts a router in the place of these functions, and forward hooks
on every Gated DeltaNet layer of *one* model, which note for their thread that such a layer runs. Routers serve the calls of such
a layer and pass all others on. So other models of the same class, and other threads, are not affected.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.integrations import experts

__all__ = ["SUPPORTED_LAYERS", "SUPPORTED_OPERATORS", "Patched", "patch"]

logger = logging.getLogger("tvm_gdn")

SUPPORTED_LAYERS = (
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "Qwen4ExpTextGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
)

_Result = tuple[torch.Tensor, "torch.Tensor | None"]


class _Offer(NamedTuple):
    """What a patched layer offers to the functions that its forward calls."""

    operators: tuple[str, ...]
    in_place: bool


class _Thread(threading.local):
    """The patched layer that runs in this thread, if any."""

    offer: _Offer | None = None


_here = _Thread()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _needs_gradients(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether transformers' own function must run, because the operators have no backward pass; said once."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)):
        return False
    if not torch.compiler.is_compiling():
        _warn_once(
            "a patched Gated DeltaNet layer runs with gradients enabled: transformers' own functions run, since tvm_gdn's"
            " operators have no backward pass; run under torch.no_grad() to use tvm_gdn"
        )
    return True


def _decode(
    original: Callable[..., _Result],
    in_place: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_unused: Any,
) -> _Result:
    """Take the place of transformers' ``torch_recurrent_gated_delta_rule``: same shapes, same K-first state."""
    import tvm_gdn

    operands = (query, key, value, g, beta)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    if _needs_gradients((*operands, initial_state)):
        return original(*operands, initial_state=initial_state, output_final_state=output_final_state, **options)
    if in_place and output_final_state and initial_state is not None:
        # The cache copies what is returned into this very tensor, so the update may as well happen there: the copy of a
        # tensor onto itself is a no-op, and no state is allocated per token.
        out = tvm_gdn.fused_recurrent_gated_delta_rule_update(*operands, initial_state_source=initial_state, **options)
        return out, initial_state
    return tvm_gdn.fused_recurrent_gated_delta_rule(
        *operands, initial_state=initial_state, output_final_state=output_final_state, **options
    )


def _prefill(
    original: Callable[..., _Result],
    in_place: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_unused: Any,
) -> _Result:
    """Take the place of transformers' ``torch_chunk_gated_delta_rule``; `in_place` is for decode only."""
    import tvm_gdn

    del in_place
    options: dict[str, Any] = {
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
    }
    if _needs_gradients((query, key, value, g, beta, initial_state)):
        return original(query, key, value, g, beta, **options)
    # transformers' convolution leaves the token axis innermost; the operators read heads. The one copy of this path.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return tvm_gdn.chunk_gated_delta_rule(query, key, value, g, beta, **options)


def _conv(
    original: Callable[..., torch.Tensor],
    in_place: bool,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor:
    """Take the place of transformers' ``causal_conv1d_fn``, on the tokens of a prompt behind the cached ones."""
    import tvm_gdn

    del in_place
    if activation not in {"silu", "swish", None} or _needs_gradients((hidden_states, weight, bias)):
        return original(hidden_states, weight, bias, activation=activation, **others)
    return tvm_gdn.causal_conv1d_fn(hidden_states, weight, bias, activation=activation)


def _conv_step(
    original: Callable[..., torch.Tensor],
    in_place: bool,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Take the place of transformers' ``causal_conv1d_update``, which writes to the cache's tensor as well."""
    import tvm_gdn

    del in_place
    if activation not in {"silu", "swish", None} or _needs_gradients((hidden_states, weight, bias)):
        return original(hidden_states, conv_state, weight, bias, activation)
    return tvm_gdn.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def _norm(
    original: Callable[..., torch.Tensor], in_place: bool, layer: Any, hidden_states: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """Take the place of the forward of transformers' gated norm; the product with the weight is not rounded in between."""
    import tvm_gdn

    del in_place
    if layer.activation not in {"silu", "swish", "sigmoid"} or _needs_gradients((hidden_states, layer.weight, gate)):
        return original(layer, hidden_states, gate)
    return tvm_gdn.rms_norm_gated(hidden_states, layer.weight, gate, layer.variance_epsilon, activation=layer.activation)


# Operator of tvm_gdn -> (function of the modeling module that it replaces, what runs instead).
_REPLACEMENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "causal_conv1d_fn": ("causal_conv1d_fn", _conv),
    "causal_conv1d_update": ("causal_conv1d_update", _conv_step),
    "chunk_gated_delta_rule": ("torch_chunk_gated_delta_rule", _prefill),
    "fused_recurrent_gated_delta_rule": ("torch_recurrent_gated_delta_rule", _decode),
}
_NORM = "rms_norm_gated"
#: Operators of Gated DeltaNet layers, and that of the experts (`integrations/experts.py`).
SUPPORTED_OPERATORS = (*_REPLACEMENTS, _NORM, "fused_experts")


@dataclass(eq=False)
class _Route:
    """A function of a module, or a method of a class, under a router; shared by all patched models whose layers call it."""

    owner: ModuleType | type
    name: str
    original: Callable[..., Any]
    router: Callable[..., Any]
    users: int = 0


_lock = threading.RLock()
_routes: dict[tuple[ModuleType | type, str], _Route] = {}
_patched_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _make_router(original: Callable[..., Any], operator: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def router(*args: Any, **kwargs: Any) -> Any:
        offer = _here.offer
        if offer is None or operator not in offer.operators:
            return original(*args, **kwargs)
        return replacement(original, offer.in_place, *args, **kwargs)

    return router


def _acquire_route(owner: ModuleType | type, name: str, operator: str, replacement: Callable[..., Any]) -> _Route:
    current = getattr(owner, name)
    route = _routes.get((owner, name))
    if route is None or current is not route.router:
        route = _Route(owner, name, current, _make_router(current, operator, replacement))
        _routes[owner, name] = route
        setattr(owner, name, route.router)
    route.users += 1
    return route


def _release_route(route: _Route) -> None:
    route.users -= 1
    if route.users:
        return
    # Somebody may have wrapped the router meanwhile: then it stays, and passes calls on.
    if getattr(route.owner, route.name) is route.router:
        setattr(route.owner, route.name, route.original)
    key = (route.owner, route.name)
    if _routes.get(key) is route:
        del _routes[key]


def _copies_into_own_tensor(cache: Any, layer: nn.Module) -> bool:
    """Whether this cache hands out its own state tensor and copies the new state into it, as transformers' caches do.

    A cache class of somebody else may share that tensor (a common prefix) or keep what it was given (a history).
    """
    from transformers.cache_utils import Cache, LinearAttentionLayer

    if not isinstance(cache, Cache):
        return False
    layer_cache: Any = cache.layers[cast(int, layer.layer_idx)]
    return (
        type(cache).get_recurrent_state is Cache.get_recurrent_state
        and type(cache).update_recurrent_state is Cache.update_recurrent_state
        and isinstance(layer_cache, LinearAttentionLayer)
        and type(layer_cache).update_recurrent_state is LinearAttentionLayer.update_recurrent_state
    )


def _begin(operators: tuple[str, ...], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args
    _here.offer = _Offer(operators, _copies_into_own_tensor(kwargs.get("cache_params"), layer))


def _end(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    del layer, args, output
    _here.offer = None


class _Layer(NamedTuple):
    name: str
    layer: nn.Module
    source: ModuleType  # the transformers module that defines its class, with the functions that its forward calls
    norm: type | None  # the class of its gated norm

    def places(self, operators: tuple[str, ...]) -> list[tuple[ModuleType | type, str, str, Callable[..., Any]]]:
        """Owner and name of each function that is replaced, the operator, and what runs instead."""
        found: list[tuple[ModuleType | type, str, str, Callable[..., Any]]] = [
            (self.source, _REPLACEMENTS[op][0], op, _REPLACEMENTS[op][1]) for op in operators if op in _REPLACEMENTS
        ]
        return [*found, (self.norm, "forward", _NORM, _norm)] if _NORM in operators and self.norm else found


class Patched:
    """A model whose Gated DeltaNet layers and experts are served by tvm_gdn until :meth:`unpatch`; made by :func:`patch`.

    Attributes
    ----------
    layers : tuple of str
        Qualified names of the patched Gated DeltaNet layers.
    experts : tuple of str
        Qualified names of the patched modules of experts.
    operators : tuple of str
        Names of the operators in use.
    """

    def __init__(
        self, found: list[_Layer], operators: tuple[str, ...], mixtures: dict[str, nn.Module], scheme: str | None
    ) -> None:
        self.layers = tuple(entry.name for entry in found)
        self.experts = tuple(mixtures)
        self.operators = operators
        self._served = experts.Served(mixtures.values(), scheme)
        self._active = True
        self._modules = tuple(entry.layer for entry in found)
        hook = functools.partial(_begin, operators)
        with _lock:
            places = dict.fromkeys(place for entry in found for place in entry.places(operators))
            self._routes = [_acquire_route(*place) for place in places]
            self._handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self._modules]
            self._handles += [layer.register_forward_hook(_end, always_call=True) for layer in self._modules]
            _patched_layers.update(self._modules)
            _patched_layers.update(mixtures.values())
            self._mixtures = tuple(mixtures.values())

    @property
    def active(self) -> bool:
        """Whether the layers are still patched."""
        return self._active

    def unpatch(self) -> None:
        """Restore the model and the modeling module; further calls do nothing."""
        with _lock:
            if not self.active:
                return
            for handle in self._handles:
                handle.remove()
            for route in self._routes:
                _release_route(route)
            _patched_layers.difference_update((*self._modules, *self._mixtures))
            self._served.restore()
            self._handles, self._routes, self._active = [], [], False

    def __enter__(self) -> Patched:
        if not self.active:
            raise ArgumentError("this Patched was unpatched already: call patch(model) again to get a new one")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return (
            f"Patched(layers={len(self.layers)}, experts={len(self.experts)}, operators={self.operators}, active={self.active})"
        )


def _find_layers(model: nn.Module) -> list[_Layer]:
    """List the instances of supported transformers classes (and of their subclasses)."""
    found = []
    for name, layer in model.named_modules():
        for cls in type(layer).__mro__:
            if cls.__name__ in SUPPORTED_LAYERS and cls.__module__.startswith("transformers.models."):
                norms = [type(m) for m in layer.children() if type(m).__name__.endswith("RMSNormGated")]
                found.append(_Layer(name, layer, sys.modules[cls.__module__], norms[0] if norms else None))
                break
    return found


def _check_calls(found: _Layer, operators: tuple[str, ...]) -> None:
    """Refuse a layer whose forward does not look up the functions to replace in its transformers module."""
    forward = inspect.unwrap(type(found.layer).forward)
    ours = getattr(forward, "__globals__", None) is vars(found.source)
    called = forward.__code__.co_names if ours else ()
    missing = [name for name in (_REPLACEMENTS[op][0] for op in operators if op != _NORM) if name not in called]
    if missing:
        import transformers

        raise ArgumentError(
            f"model: the forward of layer {found.name!r} ({type(found.layer).__name__}) does not call"
            f" {', '.join(missing)} of {found.source.__name__}, so there is nothing to replace. Install"
            f" transformers 5.23 (this is {transformers.__version__}), or call tvm_gdn in your own forward"
        )


def patch(model: nn.Module, *, operators: Iterable[str] | None = None, pack: str | None = None) -> Patched:
    """Serve a model's Gated DeltaNet layers and experts with tvm_gdn, for good or inside a ``with`` block.

    Convolution, delta rule and gated norm run compiled, for prompts and decode steps; the gates are computed in the layer's
    forward itself and stay there. A decode step updates the recurrent state in the cache's own tensor where the cache is
    one of transformers' classes (those copy the new state into that tensor anyway, so beam search, reordering and reset
    behave as before); with any other cache class a new state tensor is returned. A step that would need gradients runs
    transformers' own functions, with one log line that says so.

    Patch before ``torch.compile``: a compiled model need not notice hooks that are added later.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model (or any module that holds one) with layers of :data:`SUPPORTED_LAYERS`.
    operators : iterable of str, optional
        Which operators of tvm_gdn to use, out of :data:`SUPPORTED_OPERATORS`. Default: all of them.
    pack : str, optional
        Scheme of `pack_experts`: the experts run on packed (and maybe quantized) copies of their weights. Default: on the
        weights as they are.

    Returns
    -------
    Patched
        Already active. ``unpatch()``, or leaving its ``with`` block (also by an exception), restores every attribute.

    Raises
    ------
    ArgumentTypeError
        `model` is not a module, or `operators` is a plain string.
    ArgumentError
        The model has no supported layer, a layer is patched already (patches do not nest: unpatch first), the installed
        transformers calls other functions, or an operator's name is unknown.

    Examples
    --------
    >>> with patch(model):
    ...     model.generate(input_ids, max_new_tokens=32)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a torch.nn.Module of transformers, got {type(model).__name__}")
    if isinstance(operators, str):
        raise ArgumentTypeError(f"operators: expected a list of names, got a string: pass [{operators!r}]")
    chosen = SUPPORTED_OPERATORS if operators is None else tuple(dict.fromkeys(operators))
    unknown = [name for name in chosen if name not in SUPPORTED_OPERATORS]
    if unknown or not chosen:
        raise ArgumentError(f"operators: got {unknown or 'no name'}; allowed are {', '.join(SUPPORTED_OPERATORS)}")

    routed = tuple(name for name in chosen if name != "fused_experts")
    found = _find_layers(model) if routed else []
    mixtures = experts.find(model) if "fused_experts" in chosen else {}
    if not found and not mixtures:
        present = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "layer_idx")})
        raise ArgumentError(
            f"model: {type(model).__name__} has no Gated DeltaNet layer and no experts that can be patched; supported layer"
            f" classes are {', '.join(SUPPORTED_LAYERS)}; found {', '.join(present) or 'no numbered transformers layer'}"
        )
    for entry in found:
        _check_calls(entry, routed)
    with _lock:
        taken = [entry.name for entry in found if entry.layer in _patched_layers]
        taken += [name for name, module in mixtures.items() if module in _patched_layers]
        if taken:
            raise ArgumentError(
                f"model: layer {taken[0]!r} is patched already; call unpatch() of the Patched that holds it first"
            )
        return Patched(found, chosen, mixtures, pack)
