"""Serve a transformers model with tvm_gdn's operators: Gated DeltaNet layers, routers and experts.

:func:`patch` gives every Gated DeltaNet layer, gated norm and router of *one* model a forward of its own (`gdn_layer.py`,
`gated_norm.py` and `routing.py` beside this file), as an attribute of the module that :meth:`Patched.unpatch` deletes again.
Classes and transformers' modules stay as they are, so other models are not affected. Experts are served through
transformers' own registry (`integrations/experts.py`).
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import MethodType, ModuleType, TracebackType
from typing import Any, NamedTuple

from torch import nn

from tvm_gdn.errors import ArgumentError, ArgumentTypeError
from tvm_gdn.integrations import experts, gated_norm, gdn_layer, packing, routing
from tvm_gdn.integrations.gdn_layer import MARK, Mark, Switch

__all__ = ["SUPPORTED_LAYERS", "SUPPORTED_OPERATORS", "Patched", "patch"]

SUPPORTED_LAYERS = (
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "Qwen4ExpTextGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
)
_LAYER = (*gdn_layer.FUNCTIONS, gdn_layer.GATES)
_EXPERTS = "fused_experts"
#: Operators of Gated DeltaNet layers, of their norms, of routers and of experts.
SUPPORTED_OPERATORS = (*_LAYER, gated_norm.OPERATOR, routing.OPERATOR, _EXPERTS)

_lock = threading.RLock()
_patched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Place(NamedTuple):
    """A module that gets another forward."""

    name: str
    module: nn.Module
    functions: ModuleType  # the transformers module that defines its class
    forward: Callable[..., Any]


class Patched:
    """A model served by tvm_gdn until :meth:`unpatch`; made by :func:`patch`.

    Attributes
    ----------
    layers : tuple of str
        Qualified names of the patched Gated DeltaNet layers.
    routers : tuple of str
        Qualified names of the patched routers.
    experts : tuple of str
        Qualified names of the patched modules of experts.
    operators : tuple of str
        Names of the operators in use.
    """

    def __init__(
        self,
        places: list[_Place],
        stacks: list[nn.Module],
        operators: tuple[str, ...],
        mixtures: dict[str, nn.Module],
        scheme: str | None,
    ) -> None:
        self.layers = tuple(place.name for place in places if place.forward is gdn_layer.forward)
        self.routers = tuple(place.name for place in places if place.forward is routing.forward)
        self.experts = tuple(mixtures)
        self.operators = operators
        self._switch = Switch(operators)
        self._served = experts.Served(mixtures.values(), scheme)
        self._places = tuple(places)
        self._modules = (*(place.module for place in places), *mixtures.values())
        with _lock:
            for place in places:
                setattr(place.module, MARK, Mark(self._switch, place.functions))
                place.module.forward = MethodType(place.forward, place.module)
            self._handles = [stack.register_forward_pre_hook(packing.complete, with_kwargs=True) for stack in stacks]
            _patched.update(self._modules)

    @property
    def active(self) -> bool:
        """Whether the model is still patched."""
        return self._switch.active

    def unpatch(self) -> None:
        """Restore every module; further calls do nothing."""
        with _lock:
            if not self.active:
                return
            self._switch.active = False
            for handle in self._handles:
                handle.remove()
            for place in self._places:
                # Somebody may have wrapped the forward meanwhile: then it stays, and passes calls on to the module's own.
                if getattr(vars(place.module).get("forward"), "__func__", None) is place.forward:
                    del place.module.forward
                    delattr(place.module, MARK)
            _patched.difference_update(self._modules)
            self._served.restore()

    def __enter__(self) -> Patched:
        if not self.active:
            raise ArgumentError("this Patched was unpatched already: call patch(model) again to get a new one")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return (
            f"Patched(layers={len(self.layers)}, routers={len(self.routers)}, experts={len(self.experts)},"
            f" operators={self.operators}, active={self.active})"
        )


def _defined_by(module: nn.Module, names: tuple[str, ...]) -> ModuleType | None:
    """The transformers module that defines the class of `module`, or one of its bases, under one of these names."""
    for cls in type(module).__mro__:
        if cls.__name__ in names and cls.__module__.startswith("transformers.models."):
            return sys.modules[cls.__module__]
    return None


def _find(model: nn.Module, operators: tuple[str, ...]) -> list[_Place]:
    """Layers, norms and routers to serve with these operators."""
    found = []
    for name, module in model.named_modules():
        source = _defined_by(module, SUPPORTED_LAYERS)
        if source and set(operators) & {*_LAYER, gated_norm.OPERATOR}:
            if set(operators) & set(_LAYER):
                found.append(_Place(name, module, source, gdn_layer.forward))
            if gated_norm.OPERATOR in operators:
                norms = [(n, m) for n, m in module.named_children() if type(m).__name__.endswith("RMSNormGated")]
                found += [_Place(f"{name}.{n}", m, source, gated_norm.forward) for n, m in norms]
        source = _defined_by(module, routing.ROUTERS)
        if source and routing.OPERATOR in operators:
            found.append(_Place(name, module, source, routing.forward))
    return found


def _stacks(model: nn.Module, places: list[_Place]) -> list[nn.Module]:
    """The modules that hand position ids and masks to decoder layers of patched Gated DeltaNet layers."""
    layers = {place.module for place in places if place.forward is gdn_layer.forward}
    return [
        module
        for module in model.modules()
        if isinstance(stack := getattr(module, "layers", None), nn.ModuleList)
        and any(child in layers for decoder in stack for child in decoder.children())
    ]


def _check(place: _Place) -> None:
    """Refuse a module whose forward is not the one that ours is written for."""
    what = f"model: {place.name!r} ({type(place.module).__name__})"
    # A patched model that was pickled comes back with its class's forward as an attribute.
    own = vars(place.module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(place.module).forward:
        raise ArgumentError(
            f"{what} has a forward of its own on the module, as accelerate's hooks and hub kernels put there; load the"
            " model without them (no device_map that offloads, no use_kernels), or patch first"
        )
    forward = inspect.unwrap(type(place.module).forward)
    ours = getattr(forward, "__globals__", None) is vars(place.functions)
    called = forward.__code__.co_names if ours else ()
    wanted = tuple(gdn_layer.FUNCTIONS.values()) if place.forward is gdn_layer.forward else ()
    missing = [name for name in wanted if name not in called]
    # An argument under a name that ours does not know would vanish in its keywords, a cache for example.
    known = {*inspect.signature(place.forward).parameters, gdn_layer.OLD_CACHE}
    unknown = [name for name in inspect.signature(forward).parameters if name not in known]
    if missing or unknown or not ours:
        import transformers

        difference = (
            f"takes {', '.join(unknown)}, which tvm_gdn's does not know"
            if unknown and not missing and ours
            else (
                f"does not call {', '.join(missing) or 'what it should'} of {place.functions.__name__}, so tvm_gdn's would not do"
                " the same"
            )
        )
        raise ArgumentError(
            f"{what}: its forward {difference}. Install transformers 5.24 (this is {transformers.__version__}), or call"
            " tvm_gdn in your own forward"
        )


def patch(model: nn.Module, *, operators: Iterable[str] | None = None, pack: str | None = None) -> Patched:
    """Serve a model's Gated DeltaNet layers, routers and experts with tvm_gdn, for good or inside a ``with`` block.

    Convolution, gates, delta rule and gated norm run compiled, for prompts and decode steps; a decode step of one sequence on a
    CPU runs from the convolution to the recurrence as one operator, where all of these are chosen. A decode step updates the
    recurrent state in the cache's own tensor where the cache is one of transformers' classes (those copy the new state into that
    tensor anyway, so beam search, reordering and reset behave as before); with any other cache class a new state tensor is
    returned. A step that would need gradients runs transformers' own functions, with one log line that says so.

    Packed sequences work: several in one row ``input_ids [1, tokens]``, with their bounds in ``cu_seq_lens_q [N + 1]`` or the
    number of each token's sequence in ``seq_idx [1, tokens]``. Position ids that start again in each sequence are added where
    there are none, and no cache is made. Position ids alone are enough with ``use_cache=False``.

    Patch before ``torch.compile``: a compiled model need not notice what changes later.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model (or any module that holds one) with layers of :data:`SUPPORTED_LAYERS`, or with experts.
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
        The model has nothing to patch, a layer is patched already (patches do not nest: unpatch first) or has another
        forward than that of the supported transformers, or an operator's name is unknown.

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

    with _lock:
        places = _find(model, chosen)
        mixtures = experts.find(model) if _EXPERTS in chosen else {}
        if not places and not mixtures:
            present = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "layer_idx")})
            raise ArgumentError(
                f"model: {type(model).__name__} has no Gated DeltaNet layer and no experts that can be patched; supported layer"
                f" classes are {', '.join(SUPPORTED_LAYERS)}; found {', '.join(present) or 'no numbered transformers layer'}"
            )
        taken = [place.name for place in places if place.module in _patched]
        taken += [name for name, module in mixtures.items() if module in _patched]
        if taken:
            raise ArgumentError(
                f"model: layer {taken[0]!r} is patched already; call unpatch() of the Patched that holds it first"
            )
        for place in places:
            _check(place)
        return Patched(places, _stacks(model, places), chosen, mixtures, pack)
