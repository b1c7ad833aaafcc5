"""Portable fallback of the fused decode step on CPUs: plain loops, nothing to tune."""

from __future__ import annotations

from tvm_gdn.schedules.generic_recurrent import RecurrentGeneric
from tvm_gdn.schedules.generic_tiles import PortableFusedDecodeTiles

from tvm_gdn.schedule import schedule


@schedule("fused_decode", "generic-cpu")
class FusedDecodeGeneric(RecurrentGeneric):
    """The recurrence's."""

    made = PortableFusedDecodeTiles
