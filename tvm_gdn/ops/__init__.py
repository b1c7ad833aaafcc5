"""The operators, by name. Adding one: a module here with its SPECS and public functions, and a TIR builder in `ops/tir`."""

from __future__ import annotations

from tvm_gdn.ops import gating, moe, moe_experts, recurrent, sequence
from tvm_gdn.spec import OpSpec

OPS: dict[str, OpSpec] = {spec.name: spec for module in (gating, recurrent, sequence, moe, moe_experts) for spec in module.SPECS}
