"""The operators, by name. Adding one: a module here with its SPECS and public functions, and a TIR builder in `ops/tir`."""

from __future__ import annotations

from tvm_gdn.ops import conv, fused_decode, gating, moe, moe_experts, norm, packed_decode, recurrent, sequence
from tvm_gdn.spec import OpSpec

_MODULES = (gating, recurrent, packed_decode, sequence, conv, fused_decode, norm, moe, moe_experts)
OPS: dict[str, OpSpec] = {spec.name: spec for module in _MODULES for spec in module.SPECS}
