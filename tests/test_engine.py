"""A Gated DeltaNet layer as an engine runs it, on pools of states: every token's output is that of its sequence alone.

The engine here holds one layer; token ids stand for what the projections in front of it give. The reference computes each whole
sequence by itself, in float64, without states.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

import tvm_gdn
from tvm_gdn import reference
from tvm_gdn.parity import rms_ratio

H, HV, K, V, TAPS, SLOTS, VOCABULARY = 2, 4, 64, 32, 4, 7, 97
WIDTH = 2 * H * K + HV * V
POOL = ("initial_state_source", "initial_state_indices")
SHAPE = {"H": H, "HV": HV, "K": K, "V": V, "S": SLOTS, "index_dtype": "int32"}
CONV = {"D": WIDTH, "W": TAPS, "S": SLOTS, "activation": "silu", "index_dtype": "int32"}
KERNELS = [
    ("fused_gdn_gating", {"HV": HV, "M": 3}),
    ("rms_norm_gated", {"D": V, "M": 2, "G": HV, "with": ("z",)}),
    ("causal_conv1d_fn", {**CONV, "lengths": (2, 2), "with": ("conv_states", "query_start_loc", "cache_indices", "has_initial_state")}),
    ("causal_conv1d_update", {**CONV, "B": 2, "with": ("conv_state_indices",)}),
    ("causal_conv1d_update", {**CONV, "B": 2, "with": ()}),
    ("chunk_gated_delta_rule_update", {**SHAPE, "lengths": (2, 2), "with": (*POOL, "cu_seqlens")}),
    ("fused_sigmoid_gating_delta_rule_update", {**SHAPE, "B": 2, "T": 1, "with": POOL}),
    *(
        (
            "fused_sigmoid_gating_delta_rule_update",
            {**SHAPE, "B": 2, "T": 4, "with": (*POOL, "intermediate_states_buffer", "intermediate_state_indices", *tree)},
        )
        for tree in ((), ("retrieve_parent_token",))
    ),
]  # fmt: skip


def make_layer(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=random) * scale

    return {
        "qkv": normal(VOCABULARY, WIDTH), "z": normal(VOCABULARY, HV, V), "a": normal(VOCABULARY, HV), "b": normal(VOCABULARY, HV),
        "conv": normal(WIDTH, TAPS, scale=0.5), "A_log": normal(HV), "dt_bias": normal(HV), "norm": 1 + normal(V, scale=0.1),
    }  # fmt: skip


LAYER = make_layer()


def alone(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs ``[T, HV, V]`` and last recurrent state ``[HV, K, V]`` of a sequence from its first token on, in float64."""
    exact = {name: tensor.double() for name, tensor in LAYER.items()}
    inputs = functional.pad(exact["qkv"][ids].T[None], (TAPS - 1, 0))
    mixed = functional.silu(functional.conv1d(inputs, exact["conv"].unsqueeze(1), groups=WIDTH))[0].T
    q, k, v = (
        x.unflatten(-1, (heads, -1))[None] for x, heads in zip(mixed.split([H * K, H * K, HV * V], -1), (H, H, HV), strict=True)
    )
    g = -exact["A_log"].exp() * functional.softplus(exact["a"][ids] + exact["dt_bias"])
    o, state = reference.fused_recurrent_gated_delta_rule(
        q, k, v, g[None], exact["b"][ids].sigmoid()[None], output_final_state=True, use_qk_l2norm_in_kernel=True, exact=True
    )
    normed = o[0] * (o[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact["norm"]
    return normed * functional.silu(exact["z"][ids]), state[0]


class Engine:
    """One layer on pools of convolution and recurrent states. A sequence has a slot; -1 is padding."""

    def __init__(self):
        # What an earlier user left behind: a new sequence must not see it.
        self.conv = torch.full((SLOTS, WIDTH, TAPS - 1), 7.0)
        self.states = torch.full((SLOTS, HV, K, V), 7.0)

    def _rest(self, o: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return tvm_gdn.rms_norm_gated(o.reshape(-1, HV, V), LAYER["norm"], LAYER["z"][ids])

    def _heads(self, mixed: torch.Tensor) -> list[torch.Tensor]:
        parts = mixed.split([H * K, H * K, HV * V], -1)
        return [part.unflatten(-1, (heads, -1)) for part, heads in zip(parts, (H, H, HV), strict=True)]

    def prefill(self, work: list[tuple[int, list[int], bool]]) -> list[torch.Tensor]:
        """Packed pieces of prompts: slot, token ids, and whether the sequence goes on; the outputs of each."""
        slots = torch.tensor([slot for slot, _, _ in work], dtype=torch.int32)
        lengths = [len(ids) for _, ids, _ in work]
        ids = torch.tensor(list(itertools.chain(*(ids for _, ids, _ in work))), dtype=torch.int64)
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        goes_on = torch.tensor([flag for _, _, flag in work])
        self.states[slots[~goes_on].long()] = 0
        mixed = tvm_gdn.causal_conv1d_fn(
            LAYER["qkv"][ids].T, LAYER["conv"], None, self.conv, bounds, slots, goes_on, activation="silu"
        ).T
        g, beta = tvm_gdn.fused_gdn_gating(LAYER["A_log"], LAYER["a"][ids], LAYER["b"][ids], LAYER["dt_bias"])
        o, _ = tvm_gdn.chunk_gated_delta_rule(
            *(x[None] for x in self._heads(mixed)), g[None], beta[None], initial_state=self.states,
            initial_state_indices=slots, cu_seqlens=bounds, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return list(self._rest(o, ids).split(lengths))

    def decode(self, slots: list[int], ids: list[int]) -> torch.Tensor:
        """One token of every sequence; outputs ``[B, HV, V]``."""
        at, tokens = torch.tensor(slots, dtype=torch.int32), torch.tensor(ids)
        mixed = tvm_gdn.causal_conv1d_update(LAYER["qkv"][tokens], self.conv, LAYER["conv"], None, "silu", at)
        o = self._recur(mixed[:, None], tokens[:, None], at)
        return self._rest(o, tokens)

    def _recur(self, mixed: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, **verify: object) -> torch.Tensor:
        return tvm_gdn.fused_sigmoid_gating_delta_rule_update(
            LAYER["A_log"], LAYER["a"][ids], LAYER["dt_bias"], 1.0, 20.0, *self._heads(mixed), LAYER["b"][ids],
            self.states, slots, use_qk_l2norm_in_kernel=True, **verify,
        )  # fmt: skip

    def verify(self, slots: list[int], drafts: list[list[int]], parents: list[list[int]] | None) -> torch.Tensor:
        """Outputs ``[N, T, HV, V]`` of drafted tokens; the pools stay, the states after every step are kept for `commit`."""
        at, ids = torch.tensor(slots, dtype=torch.int32), torch.tensor(drafts)
        sequences, steps = ids.shape
        inputs = LAYER["qkv"][ids]
        windows = torch.empty(sequences, steps, WIDTH, TAPS - 1)  # the inputs in front of each token: those behind its parent
        for n, slot in enumerate(slots):
            windows[n, 0] = self.conv[slot]
            for step in range(1, steps):
                parent = parents[n][step] if parents else step - 1
                windows[n, step] = torch.cat([windows[n, parent], inputs[n, parent, :, None]], 1)[:, 1:]
        # Every token is a sequence of its own here, and leaves the inputs that a commit needs.
        self.steps_conv = windows
        mixed = tvm_gdn.causal_conv1d_update(inputs.flatten(0, 1), windows.flatten(0, 1), LAYER["conv"], None, "silu")
        mixed = mixed.view_as(inputs)
        self.steps = torch.empty(sequences, steps, HV, K, V)
        tree = {} if parents is None else {"retrieve_parent_token": torch.tensor(parents, dtype=torch.int32)}
        before = self.conv.clone(), self.states.clone()
        o = self._recur(
            mixed, ids, at, disable_state_update=True, intermediate_states_buffer=self.steps,
            intermediate_state_indices=torch.arange(sequences, dtype=torch.int32), cache_steps=steps, **tree,
        )  # fmt: skip
        for pool, copy in zip((self.conv, self.states), before, strict=True):
            assert torch.equal(pool.view(torch.int32), copy.view(torch.int32))  # NaN is a value like any other here
        return self._rest(o, ids.flatten()).view(sequences, steps, HV, V)

    def commit(self, slots: list[int], accepted: list[int]) -> None:
        """Take over the states after the accepted step of every sequence."""
        for n, (slot, step) in enumerate(zip(slots, accepted, strict=True)):
            self.conv[slot] = self.steps_conv[n, step]
            self.states[slot] = self.steps[n, step]


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert found.abs().max() > 0.1
    return rms_ratio(found, wanted) < 1e-5


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3), (63, 64, 129), (100, 164, 199)])
def test_a_prompt_in_any_parts_equals_one_call(cuts):
    """Convolution and recurrent states carried from part to part, beside a neighbour that is cut elsewhere."""
    ids, other = tokens(200, 1), tokens(90, 2)
    engine = Engine()
    found: list[list[torch.Tensor]] = [[], []]
    ends = (0, *cuts, 200)
    for n, (first, last) in enumerate(itertools.pairwise(ends)):
        step = -(-90 // (len(ends) - 1))
        parts = ids[first:last], other[n * step : (n + 1) * step]
        for out, part in zip(found, engine.prefill([(5, parts[0], n > 0), (2, parts[1], n > 0)]), strict=True):
            out.append(part)
    for slot, whole, parts in ((5, ids, found[0]), (2, other, found[1])):
        wanted, state = alone(whole)
        assert close(torch.cat(parts), wanted)
        assert close(engine.states[slot], state)
        assert torch.equal(engine.conv[slot], LAYER["qkv"][whole[-(TAPS - 1) :]].T)
    untouched = [0, 1, 3, 4, 6]
    assert (engine.states[untouched] == 7).all() and (engine.conv[untouched] == 7).all()


def test_continuous_batching():
    """Requests of mixed lengths arrive, decode together with padding, leave, and their slots go to others."""
    engine, slot_of = Engine(), {"a": 3, "b": 0, "c": 6, "d": 1, "e": 0}
    ids = {name: tokens(length, seed) for seed, (name, length) in enumerate(zip("abcde", (90, 40, 23, 140, 33), strict=True))}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ids}
    done = dict.fromkeys(ids, 0)

    def prefill(**counts):
        work = [(slot_of[n], ids[n][done[n] : done[n] + count], done[n] > 0) for n, count in counts.items()]
        for (name, count), out in zip(counts.items(), engine.prefill(work), strict=True):
            found[name].append(out)
            done[name] += count

    def decode(names, padding=0):
        slots = [slot_of[n] for n in names] + [-1] * padding
        out = engine.decode(slots, [ids[n][done[n]] for n in names] + [0] * padding)
        for n, row in zip(names, out[: len(names)], strict=True):
            found[n].append(row[None])
            done[n] += 1

    prefill(a=63, b=1, c=7)
    for _ in range(9):
        decode("abc", padding=2)
    prefill(d=65)
    decode("cab")
    prefill(d=63)  # the rest of a long prompt while others decode
    for _ in range(6):
        decode("dcab", padding=1)
    prefill(e=17, d=2)  # b has left: its slot goes to e
    while done["e"] < 33:
        decode([n for n in "aced" if done[n] < len(ids[n])])
    for name in "abcde":
        wanted, state = alone(ids[name][: done[name]])
        assert done[name] > 15 and close(torch.cat(found[name]), wanted), name
        if name != "b":
            assert close(engine.states[slot_of[name]], state), name


TREE = [[-1, 0, 0, 1], [-1, 0, 1, 0]]


@pytest.mark.parametrize("parents", [None, TREE], ids=["linear", "tree"])
def test_verify_commit_and_go_on(parents):
    """Drafts are verified in one call, the accepted step is committed to both pools, and decoding goes on from there.

    Three rounds with other accepted steps, the first token alone among them; the outputs of every draft are those of its path.
    """
    engine, slots = Engine(), [4, 1]
    prompts = [tokens(21, 7), tokens(66, 8)]
    engine.prefill([(slot, ids, False) for slot, ids in zip(slots, prompts, strict=True)])
    for round_, accepted in enumerate(((3, 2), (0, 3), (2, 1))):
        drafts = [tokens(4, 10 * round_ + n) for n in range(2)]
        out = engine.verify(slots, drafts, parents)
        for n in range(2):
            for step in range(4):
                path = [step]
                while path[0]:
                    path.insert(0, parents[n][path[0]] if parents else path[0] - 1)
                wanted, state = alone([*prompts[n], *(drafts[n][i] for i in path)])
                assert close(out[n, path], wanted[-len(path) :])
                if step == accepted[n]:
                    chosen = [drafts[n][i] for i in path]
                    assert close(engine.steps[n, step], state)
            prompts[n] = [*prompts[n], *chosen]
        engine.commit(slots, accepted)
        for step in range(2):
            following = [tokens(1, 100 + 10 * round_ + step + n)[0] for n in range(2)]
            decoded = engine.decode(slots, following)
            for n in range(2):
                prompts[n] = [*prompts[n], following[n]]
                wanted, state = alone(prompts[n])
                assert close(decoded[n], wanted[-1])
                assert close(engine.states[slots[n]], state)
    assert (engine.states[[0, 2, 3, 5, 6]] == 7).all() and (engine.conv[[0, 2, 3, 5, 6]] == 7).all()


def test_poison_stays_in_its_sequence(monkeypatch):
    """NaN in the inputs of one sequence: the others' outputs and states are bit-identical, through prefill, decode and verify."""
    work = [(2, tokens(70, 1), False), (5, tokens(65, 2), False), (0, tokens(3, 3), False)]

    def run(poison: bool) -> tuple[list[torch.Tensor], Engine]:
        engine = Engine()
        bad = 96
        for name in ("qkv", "a", "b", "z"):
            tensor = LAYER[name].clone()
            tensor[bad] = float("nan")
            monkeypatch.setitem(LAYER, name, tensor)
        ids = [[i % bad for i in part] for _, part, _ in work]
        if poison:
            ids[1][11:40] = [bad] * 29
        outs = engine.prefill([(slot, part, False) for (slot, _, _), part in zip(work, ids, strict=True)])
        outs += list(engine.decode([2, 5, 0], [1, bad if poison else 2, 3]))
        outs += list(engine.verify([2, 5, 0], [[4, 5, 6, 7]] * 3, [[-1, 0, 0, 1]] * 3))
        return outs, engine

    (clean, before), (found, after) = run(False), run(True)
    for n, (left, right) in enumerate(zip(clean, found, strict=True)):
        assert torch.equal(left, right) if n % 3 != 1 else right.isnan().any(), n
    assert not any(x.isnan().any() for x in clean) and found[1][11:].isnan().all()
    for left, right in ((before.conv, after.conv), (before.states, after.states)):
        others = [0, 1, 2, 3, 4, 6]
        assert torch.equal(left[others], right[others])
    assert torch.equal(before.steps[[0, 2]], after.steps[[0, 2]]) and after.states[5].isnan().all()
