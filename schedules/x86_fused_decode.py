"""Design space of the fused decode step on x86 CPUs."""

from __future__ import annotations

from tvm_gdn.schedules.cpu_fused_decode import FusedDecodeTiles
from tvm_gdn.schedules.x86_recurrent import RecurrentX86

from tvm_gdn.schedule import schedule


@schedule("fused_decode", "x86")
class FusedDecodeX86(RecurrentX86):
    """The recurrence's: the convolution adds a tenth of its work and 3 % of its bytes."""

    made = FusedDecodeTiles
