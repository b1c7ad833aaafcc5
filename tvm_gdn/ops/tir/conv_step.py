"""What one token of a causal depthwise convolution is made of, for the convolution itself and for the fused decode step.

    o[c, t] = act(bias[c] + sum_k weight[c, k] * x[c, t - (W-1) + k])          in fp32

Macros on `width` neighbouring channels: taps and bias as columns in fp32, a state of the last L inputs as columns in its own
dtype, the sum, the activation, and the state's move by one token or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from tvm_gdn.ops.tir.slots import find_shared


class ConvStep:
    """Macros of one geometry.

    Parameters
    ----------
    tiles : object
        The target's `scalars`, `array`, `columns_in`, `columns_out` and `lane_loop`.
    W, L : int
        Taps per channel, inputs per channel in a state.
    state : str
        Dtype of states.
    biased, silu : bool
        Whether there is a bias; whether the activation is silu (else none).
    index : callable
        ``index(n, c, t)`` gives the index of channel c and token t of sequence n in x.
    """

    def __init__(
        self, tiles: Any, *, W: int, L: int, state: str, biased: bool, silu: bool, index: Callable[..., tuple[Any, ...]]
    ) -> None:
        self.W, self.L, self.state, self.biased, self.index = W, L, state, biased, index
        self.loop = tiles.lane_loop
        self.load_taps, self.begin = self._load_taps(tiles), self._begin()
        self.load_state, self.store_state = self._load_state(tiles), self._store_state(tiles)
        self.products, self.head, self.keep = self._products(), self._head(), self._keep()
        self.activate = self._activate(tiles) if silu else self._leave()
        self.check_slots, self.check_strides = self._check_slots(tiles), self._check_strides()

    def _load_taps(self, tiles: Any) -> Any:
        W, biased, loop = self.W, self.biased, self.loop

        @T.inline
        def load_taps(taps, at, pitch, weight, flat, dense, bias, c, width):
            """Taps of channels from c on, and behind them their bias: rows `pitch` apart, from column `at` on."""
            if dense:
                tiles.columns_in(taps, at, flat, c * W, W, pitch, width)
            else:
                for k in T.unroll(W):
                    for lane in loop(width):
                        taps[k * pitch + at + lane] = T.Cast("float32", weight[c + lane, k])
            for lane in loop(width):
                if biased:
                    taps[W * pitch + at + lane] = T.Cast("float32", bias[c + lane])
                else:
                    taps[W * pitch + at + lane] = T.float32(0)

        return load_taps

    def _begin(self) -> Any:
        W, loop = self.W, self.loop

        @T.inline
        def begin(acc, taps, at, pitch, width, along):
            """Start sums of `width` channels (along = 1) or tokens of one channel (0)."""
            for lane in loop(width):
                acc[lane] = taps[W * pitch + at + lane * along]

        return begin

    def _products(self) -> Any:
        W, begin, loop = self.W, self.begin, self.loop

        @T.inline
        def products(acc, taps, at, pitch, width, along, inputs):
            """Sums of `width` channels or tokens whose inputs are all there: ``inputs(k, lane)``."""
            begin(acc, taps, at, pitch, width, along)
            for k in T.unroll(W):
                for lane in loop(width):
                    acc[lane] = acc[lane] + taps[k * pitch + at + lane * along] * inputs(k, lane)

        return products

    def _head(self) -> Any:
        W, L, begin, index, loop = self.W, self.L, self.begin, self.index, self.loop

        @T.inline
        def head(acc, taps, at, pitch, old, stateful, source, n, c, t, start, width):
            """Sums of token t of `width` channels, of whose inputs some may lie before the sequence's start, in the state."""
            begin(acc, taps, at, pitch, width, 1)
            for k in T.unroll(W):
                where: T.let[T.int64] = t - (W - 1) + k
                if where >= start:
                    for lane in loop(width):
                        acc[lane] = acc[lane] + taps[k * pitch + at + lane] * T.Cast("float32", source[index(n, c + lane, where)])
                elif stateful:
                    for lane in loop(width):
                        acc[lane] = acc[lane] + taps[k * pitch + at + lane] * T.Cast(
                            "float32", old[(L + where - start) * width + lane]
                        )

        return head

    def _activate(self, tiles: Any) -> Any:
        loop = self.loop

        @T.inline
        def activate(acc, width, sigmoid):
            """Set acc to acc * sigmoid(acc)."""
            gate = tiles.scalars(width)
            for lane in loop(width):
                gate[lane] = acc[lane]
            sigmoid(gate)
            for lane in loop(width):
                acc[lane] = acc[lane] * gate[lane]

        return activate

    def _leave(self) -> Any:
        @T.inline
        def activate(acc, width, sigmoid):
            pass

        return activate

    def _load_state(self, tiles: Any) -> Any:
        L, dtype, loop = self.L, self.state, self.loop

        @T.inline
        def load_state(old, states, flat, dense, first, slot, present, c, width):
            """The state that channels from c on start from, a row of channels per input; `first` is its element 0 in memory.

            `dense` is known to be true where `columns_in` leaves out by itself what is not present.
            """
            if isinstance(dense, bool):
                tiles.columns_in(old, 0, flat, first, L, width, width, present)
            elif not present:
                for j in T.unroll(L):
                    for lane in loop(width):
                        old[j * width + lane] = T.Cast(dtype, T.float32(0))
            elif dense:
                tiles.columns_in(old, 0, flat, first, L, width, width)
            else:
                for j in T.unroll(L):
                    for lane in loop(width):
                        old[j * width + lane] = states[slot, c + lane, j]

        return load_state

    def _store_state(self, tiles: Any) -> Any:
        L, loop = self.L, self.loop

        @T.inline
        def store_state(old, states, flat, dense, first, slot, c, width):
            """The inverse of `load_state`."""
            if dense:
                tiles.columns_out(flat, first, old, 0, L, width, width)
            else:
                for j in T.unroll(L):
                    for lane in loop(width):
                        states[slot, c + lane, j] = old[j * width + lane]

        return store_state

    def _keep(self) -> Any:
        L, dtype, index, loop = self.L, self.state, self.index, self.loop

        @T.inline
        def keep(old, source, n, c, start, until, width):
            """The state becomes the last L inputs before `until`; what stays of it moves towards index 0."""
            for j in T.unroll(L):
                where: T.let[T.int64] = until - L + j
                if where >= start:
                    for lane in loop(width):
                        old[j * width + lane] = T.Cast(dtype, source[index(n, c + lane, where)])
                else:
                    for lane in loop(width):
                        old[j * width + lane] = old[(L + where - start) * width + lane]

        return keep

    def _check_slots(self, tiles: Any) -> Any:
        @T.inline
        def check_slots(indices, length, sequences, slots, pad):
            """One slot per sequence, within the pool or `pad`, and each but `pad` once."""
            assert length == sequences, ("ValueError", ["conv slots: length"])
            for n in T.serial(sequences):
                assert T.Cast("int64", indices[n]) == pad or (
                    T.Cast("int64", indices[n]) >= 0 and T.Cast("int64", indices[n]) < slots
                ), ("ValueError", ["conv slots: slot"])
            shared = tiles.scalars(1)
            find_shared(shared, indices, sequences, slots, pad)
            assert shared[0] == T.float32(0), ("ValueError", ["conv slots: shared"])

        return check_slots

    def _check_strides(self) -> Any:
        L = self.L

        def reach(own: Any, stride: Any, size: Any) -> Any:
            """Elements that an axis spans if its stride is no longer than `own`."""
            return T.Select(T.And(size > 1, stride <= own), stride * (size - 1), T.int64(0))

        @T.inline
        def check_strides(S, D, s0, s1, s2):
            """States are written to: every element needs memory of its own. Each axis steps over what the finer ones span."""
            assert (
                (S <= 1 or s0 > reach(s0, s1, D) + reach(s0, s2, T.int64(L)))
                and (D <= 1 or s1 > reach(s1, s0, S) + reach(s1, s2, T.int64(L)))
                and (L <= 1 or s2 > reach(s2, s0, S) + reach(s2, s1, D))
            ), ("ValueError", ["conv states: overlapping"])

        return check_strides
