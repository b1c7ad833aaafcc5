"""Every example runs as its docstring says, and its printed numbers are within the limits that it prints beside them."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from calls import POOL, kernels_of_a_model
from processes import environment

import tvm_gdn
from tvm_gdn import parity, reference

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECK = re.compile(
    r"^check (?P<what>[^:]+): .*?(?P<number>[\d.]+(?:e[+-]\d+)?)\b.*, limit (?P<limit>[\d.]+(?:e[+-]\d+)?)$", re.MULTILINE
)
#: What each example checks, and whether the number must also be above 0, as rounding makes it.
CHECKS = {
    "basic_call": {"o": True, "state": True},
    "multi_turn": {"o": True, "state": True, "other slots": False},
    "varlen_batch": {f"sequence {n} of {length} tokens": length > 0 for n, length in enumerate((63, 1, 0, 200, 17))},
    "verify_tree": {"pool before the commit": False, "sequence 0, path 0-1-3": True, "sequence 1, path 0-2": True},
    "moe_int4": {"bytes of bf16": True, "packed weights": True, "original weights": True},
    "transformers_patch": {"tokens": False, "logits": True},
}
ONE = {"B": 1, "T": 1, "H": 1, "HV": 1, "K": 128, "V": 128, "S": 2}
KERNELS = [
    ("chunk_gated_delta_rule_update", {**ONE, "with": POOL}),
    ("chunk_gated_delta_rule", {**ONE, "lengths": (1,), "output_final_state": True, "with": ("initial_state", "cu_seqlens")}),
    *(
        ("fused_recurrent_gated_delta_rule_update", {**ONE, "with": given})
        for given in (
            POOL[:1],
            POOL,
            (*POOL, "intermediate_states_buffer", "intermediate_state_indices", "retrieve_parent_token"),
        )
    ),
    *kernels_of_a_model(64, 64),
]


@pytest.mark.parametrize("name", CHECKS)
def test_example_checks_its_own_numbers(name):
    if name == "transformers_patch":
        pytest.importorskip("transformers.models.qwen3_next")
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"],
        capture_output=True, text=True, cwd=ROOT, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {match["what"]: (float(match["number"]), float(match["limit"])) for match in CHECK.finditer(done.stdout)}
    assert set(found) == set(CHECKS[name]), done.stdout
    for what, (number, limit) in found.items():
        assert number <= limit, done.stdout
        assert number > 0 or not CHECKS[name][what], done.stdout


def test_every_example_is_tested_and_linked():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == set(CHECKS)
    assert all(f"(examples/{name}.py)" in README for name in names)


def test_the_first_call_of_the_readme():
    code = re.search(r"^```python\n(.*?)^```", README, re.S | re.M)[1]
    scope: dict = {}
    exec(code, scope)
    pool, slots = torch.zeros_like(scope["pool"]), torch.tensor([3, 17, 42, -1])
    want = reference.fused_recurrent_gated_delta_rule_update(
        *(scope[name] for name in ("q", "k", "v", "g", "beta")),
        initial_state_source=pool, initial_state_indices=slots, use_qk_l2norm_in_kernel=True, exact=True,
    )  # fmt: skip
    assert parity.rms_ratio(scope["o"], want) < 1e-5 and parity.rms_ratio(scope["pool"], pool) < 1e-5
    assert want.abs().max() > 0 and pool[[3, 17, 42]].abs().amax((1, 2, 3)).min() > 0


def test_what_the_readme_imports_is_there():
    found = re.findall(r"^from (tvm_gdn\S*) import (\w+)$", README, re.M)
    assert found and all(hasattr(import_module(module), name) for module, name in found)
    # Names in running text are of what `import tvm_gdn` brings along.
    assert all(hasattr(tvm_gdn, name) for name in re.findall(r"(?<![./\w])tvm_gdn\.(\w+)", README))
