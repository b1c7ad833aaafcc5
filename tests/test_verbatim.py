"""Test files written for the neighbours run once their imports are changed, and nothing else is.

`tests/neighbours/` holds the scenarios of SGLang's gated-delta-rule suite (gating, prefill, decode, verification, whole flows,
throughput: 46 tests) for both eras of its functions, and some of flash-linear-attention's. They import the neighbours and know
nothing of tvm_gdn; here the imports are rewritten and pytest runs the result.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from calls import GATING, POOL, RECURRENT, SIGMOID, UPDATE

CHUNK = "chunk_gated_delta_rule"
_BF16 = {"dtype": "bfloat16", "H": 2, "HV": 4, "K": 128, "V": 128, "lengths": (3,), "index_dtype": "int32"}
_POOL, _STATES = {"with": (*POOL, "cu_seqlens")}, {"with": ("initial_state", "cu_seqlens"), "output_final_state": True}
_FP32 = {"B": 1, "T": 3, "H": 2, "HV": 2, "K": 64, "V": 128, "with": ("initial_state",), "output_final_state": True}
_GATES = {"dtypes": {"beta": "float32"}}
#: What the files call, compiled in one batch.
KERNELS = [
    (GATING, {"M": 3, "HV": 4, "dtype": "bfloat16", "dtypes": {"A_log": "float32"}}),
    *((op, {**_BF16, **_POOL, "state_v_first": v}) for op in (SIGMOID, UPDATE) for v in (True, False)),
    (f"{CHUNK}_update", {**_BF16, **_POOL, "K": 64, "V": 64, "state_v_first": True}),
    (f"{CHUNK}_update", {**_BF16, **_POOL, **_GATES, "state_v_first": True}),
    (CHUNK, {**_BF16, **_STATES, "K": 64, "V": 64}),
    (CHUNK, {**_BF16, **_STATES, **_GATES}),
    (CHUNK, {**_FP32, "lengths": (3,), "with": _STATES["with"]}),
    *((op, _FP32) for op in (CHUNK, RECURRENT, "chunk_kda", "fused_recurrent_kda", "chunk_delta_rule", "fused_recurrent_delta_rule")),
]  # fmt: skip

_HERE = Path(__file__).parent / "neighbours"
#: File -> its tests, and what its imports become: (module as a pattern, ours).
FILES = {
    "sglang_2026.py": (46, [(r"sglang\.kernels\.ops\.attention\.[\w.]+", "tvm_gdn.integrations.sglang")]),
    "sglang_2025.py": (
        46,
        [
            # Before October 2025 the gating function took no b and returned g alone.
            (r"sglang\.srt\.models\.qwen3_next import fused_gdn_gating",
             "tvm_gdn.integrations.sglang_k_first import fused_gdn_gating_g as fused_gdn_gating"),
            (r"sglang\.srt\.layers\.attention\.fla\.[\w.]+", "tvm_gdn.integrations.sglang_k_first"),
        ],
    ),
    "fla.py": (13, [(r"fla\.ops\.[\w.]+", "tvm_gdn.integrations.fla")]),
}  # fmt: skip


def with_our_imports(source: str, renamed: list[tuple[str, str]]) -> str:
    """The same file with other modules in its ``from ... import`` lines."""
    for module, ours in renamed:
        source = re.sub(rf"^from {module}", f"from {ours}", source, flags=re.MULTILINE)
    return source


#: The older era has the same scenarios.
_PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name == "sglang_2025.py" else name for name in FILES]


@pytest.mark.parametrize("name", _PARAMETERS)
def test_a_neighbours_test_file_runs_by_changing_its_imports(name, tmp_path):
    count, renamed = FILES[name]
    source = (_HERE / name).read_text(encoding="utf-8")
    changed = with_our_imports(source, renamed)
    lines = [(old, new) for old, new in zip(source.splitlines(), changed.splitlines(), strict=True) if old != new]
    assert lines and all(old.startswith("from ") and "import" in old and "tvm_gdn" in new for old, new in lines)
    assert not re.search(r"^(from|import) (sglang|fla)\b", changed, flags=re.MULTILINE)
    assert "tvm_gdn" not in re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    path = tmp_path / f"test_{name}"
    path.write_text(changed, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path), str(path)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(rf"^{count} passed", done.stdout, flags=re.MULTILINE), done.stdout[-500:]


def _environment() -> dict[str, str]:
    from tvm_gdn.build import builder_environment

    return builder_environment()
