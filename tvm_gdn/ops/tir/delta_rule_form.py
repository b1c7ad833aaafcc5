"""What the parts of the delta-rule kernel share (`delta_rule.py`): its form, its arguments, a worker's place and its vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm_gdn.spec import Geometry


class Form:
    """What a geometry decides while a kernel is parsed.

    Parameters
    ----------
    geometry : Geometry
        Static axes K and V, dtypes of the tensors present, ``state_v_first`` and ``output_final_state``.
    """

    def __init__(self, geometry: Geometry) -> None:
        has = self.has = geometry.dtype
        self.K, self.V = geometry.axis["K"], geometry.axis["V"]
        self.packed = "mixed_qkv" in has
        # The packed row is convolved here. A worker then takes all value heads of a q/k head: its q and k are convolved once, and
        # their convolution states have one reader and writer.
        self.convolved = "conv_state" in has
        self.conv_slots_given = "conv_state_indices" in has
        self.gated = "g" in has
        self.channel_gate = bool(geometry.attr.get("channel_gate", False))
        self.fused_gate = "A_log" in has
        self.varlen = "cu_seqlens" in has
        self.pool = "initial_state_source" in has
        self.slots_given = "initial_state_indices" in has
        self.separate = "initial_state" in has
        self.final = bool(geometry.attr.get("output_final_state", False)) or "final_state" in has
        self.buffered = "intermediate_states_buffer" in has
        self.buffer_slots_given = "intermediate_state_indices" in has
        self.tree = "retrieve_parent_token" in has
        self.data = self.dtype_of("mixed_qkv" if self.packed else "q")

    def dtype_of(self, name: str, default: str = "float32") -> str:
        """Dtype of a tensor; `default` if the operator has none of the name."""
        return self.has.get(name, default)


@dataclass(frozen=True, eq=False)
class Arguments:
    """The kernel's tensors, with their shapes and strides, and its scalars."""

    q: Any
    k: Any
    v: Any
    mixed_qkv: Any
    g: Any
    beta: Any
    A_log: Any
    a: Any
    dt_bias: Any
    b: Any
    cu_seqlens: Any
    initial_state_source: Any
    initial_state_indices: Any
    initial_state: Any
    final_state: Any
    intermediate_states_buffer: Any
    intermediate_state_indices: Any
    retrieve_parent_token: Any
    conv_state: Any
    conv_weight: Any
    conv_bias: Any
    conv_state_indices: Any
    o: Any
    scale: Any
    softplus_beta: Any
    softplus_threshold: Any
    use_qk_l2norm_in_kernel: Any
    disable_state_update: Any
    cache_steps: Any
    pad_slot_id: Any
    #: Of q and k.
    heads: Any
    n_seq: Any


@dataclass(frozen=True, eq=False)
class Worker:
    """A worker, and what it works on.

    Sequence `n`, `length` tokens from `first` of a row, q/k head `h`, value heads from `hv`, the states' slots.
    """

    form: Form
    #: The target's tile operations.
    tiles: Any
    call: Arguments
    n: Any
    row: Any
    first: Any
    length: Any
    h: Any
    hv: Any
    slot: Any
    buffer_slot: Any


@dataclass(frozen=True, eq=False)
class Vectors:
    """A worker's vectors of a token: of K and V elements, and scalars."""

    #: k and q.
    x: Any
    y: Any
    #: Decays, and those times k.
    d: Any
    dx: Any
    u: Any
    #: v as it is in memory, then o.
    z: Any
    #: v: z, or what was convolved.
    v: Any
    #: Decay, beta, a sum, factors of k and q.
    m: Any
    #: Of the gates' formula; none where gates are given.
    gates: tuple[Any, ...]
