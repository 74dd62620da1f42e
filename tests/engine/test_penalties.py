"""Penalties against the formula in float64, counts against a rescan, and the faults that published engines had."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.penalties import DOMAIN, Counts, count, penalise, penalties

Array = np.ndarray[Any, np.dtype[Any]]

# Of logits i − 7.5; id 9 occurs twice: 1.5/1.3 − 0.4 − 0.5.
VECTOR = [-10.4, -9.35, -8.05, -6.75, -3.5, -4.4, -1.5, -1.3, 0.5, 1.5 / 1.3 - 0.9, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


def formula(logits: Array, history: list[int], rp: float, pp: float, fp: float) -> Array:
    """One row in float64, id by id."""
    v = logits.astype(np.float64)
    for i in {i for i in history if 0 <= i < len(logits)}:
        v[i] = v[i] / rp if v[i] > 0 else v[i] * rp
        v[i] -= pp + fp * history.count(i)
    return v


def test_the_published_vector() -> None:
    history = mx.array([1, 1, 2, 5, 5, 5, 7, 0, 3, 3, 9, 9, 2])
    actual = penalties(mx.arange(16) - 7.5, history, repetition=1.3, presence=0.4, frequency=0.25)
    assert np.allclose(np.array(actual), VECTOR, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("rp", "pp", "fp"), [(1.3, 0.4, 0.25), (0.7, 0, 0), (1, -0.5, 0), (1, 0, 0.1), (1.9, 0.3, -0.2)]
)
def test_rows_agree_with_the_formula_and_leave_the_rest_alone(dtype: str, rp: float, pp: float, fp: float) -> None:
    rng = np.random.default_rng(5)
    logits = mx.array(rng.standard_normal((3, 40)) * 8).astype(getattr(mx, dtype))
    history = rng.integers(-4, 45, (3, 30))
    actual = penalties(logits, mx.array(history), repetition=rp, presence=pp, frequency=fp)
    assert actual.dtype == logits.dtype
    unit = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for b in range(3):
        raw = np.array(logits[b].astype(mx.float32))
        got, expected = np.array(actual[b].astype(mx.float32)), formula(raw, history[b].tolist(), rp, pp, fp)
        # One rounding to the dtype, and three in float32 of terms no larger than these.
        size = np.abs(raw) * max(rp, 1 / rp) + abs(pp) + abs(fp) * 30
        assert (np.abs(got - expected) <= unit * np.abs(expected) + 4 * 2**-24 * size).all()
        absent = [i for i in range(40) if i not in history[b]]
        assert absent
        assert np.array_equal(got[absent], raw[absent])


@pytest.mark.parametrize("history", [[], [-1, -1], [7, 100, -(2**31)]])
def test_nothing_in_range_changes_no_bit(history: list[int]) -> None:
    logits = mx.array([1.5, -2.5, -0.0, float("nan"), float("-inf"), 3e38, 1e-40])
    actual = penalties(logits, mx.array(history, dtype=mx.int32), repetition=1.7, presence=3, frequency=2)
    assert mx.array_equal(actual.view(mx.uint32), logits.view(mx.uint32))


def test_a_repetition_of_one_keeps_the_bits_of_ids_that_occur() -> None:
    logits = mx.random.normal((4, 100), key=mx.random.key(1))
    history = mx.random.randint(0, 100, (4, 300), key=mx.random.key(2))
    actual = penalties(logits, history, repetition=[1, 1, 1.5, 1])
    assert mx.array_equal(actual[[0, 1, 3]], logits[[0, 1, 3]])
    assert not mx.array_equal(actual[2], logits[2])


def test_each_row_has_its_own_penalties_and_history() -> None:
    logits = mx.random.normal((3, 11), key=mx.random.key(3))
    history = mx.random.randint(-2, 13, (3, 6), key=mx.random.key(4))
    options: dict[str, list[float]] = {"repetition": [1.2, 1, 0.8], "presence": [0, 0.5, 1], "frequency": [0.1, 0, 2]}
    together = penalties(logits, history, **options)  # type: ignore[arg-type]
    for b in range(3):
        alone = penalties(logits[b], history[b], **{name: value[b] for name, value in options.items()})
        assert mx.array_equal(together[b], alone)


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int32, mx.uint32, mx.int64])
def test_ids_of_any_integer_type_are_counted_and_never_wrapped(dtype: mx.Dtype) -> None:
    # A vocabulary of 300 as an 8-bit number would be 44.
    assert np.array(count(mx.array([[5, 44, 5, 127]], dtype=dtype), 300)).nonzero()[1].tolist() == [5, 44, 127]
    assert count(mx.array([[5, 44, 5]], dtype=dtype), 6).tolist() == [[0, 0, 0, 0, 0, 2]]


def test_counts_equal_a_rescan_through_joins_and_leaves() -> None:
    rng, V = np.random.default_rng(7), 9
    said: list[list[int]] = [[1, 2, 2], [8, 8, -1]]
    counts = Counts(mx.array(said), V)
    for step in range(40):
        tokens = rng.integers(-2, V + 2, len(said)).tolist()
        counts.add(mx.array(tokens))
        for row, token in zip(said, tokens, strict=True):
            row.append(token)
        if step % 7 == 3:
            rows = rng.permutation(len(said))[: max(1, len(said) - 1)].tolist()
            counts.filter(rows)
            said = [said[i] for i in rows]
        if step % 5 == 2:
            new = rng.integers(0, V, (2, 4)).tolist()
            counts.extend(Counts(mx.array(new), V))
            said += new
        longest = max(map(len, said))
        rescan = count(mx.array([[-1] * (longest - len(row)) + row for row in said]), V)
        assert counts.array.dtype == mx.int32
        assert mx.array_equal(counts.array, rescan), step
    logits = mx.random.normal((len(said), V), key=mx.random.key(0))
    history = mx.array([[-1] * (longest - len(row)) + row for row in said])
    options = {"repetition": 1.3, "presence": 0.4, "frequency": 0.25}
    assert mx.array_equal(penalise(logits, counts.array, **options), penalties(logits, history, **options))


class Lazy(Counts):
    """The planted fault: nothing is evaluated until somebody looks."""

    def _set(self, array: mx.array) -> None:
        self.array = array


def growth(counts: Counts, steps: int = 500) -> int:
    token = mx.array([3, 4])
    before = mx.get_active_memory()
    for _ in range(steps):
        counts.add(token)
    mx.synchronize()
    return mx.get_active_memory() - before


def test_no_graph_grows_with_the_steps() -> None:
    empty = mx.zeros((2, 0), dtype=mx.int32)
    counts, lazy = Counts(empty, 50), Lazy(empty, 50)
    assert growth(counts) < 500
    assert growth(lazy) > 4 * 500
    assert counts.array[0, 3].item() == lazy.array[0, 3].item() == 500


def test_log_probabilities_are_the_wrong_domain() -> None:
    """On log-softmax values the divide branch never fires: the penalty of a likely token all but vanishes."""
    logits, history = mx.array([5.0, 1.0, 0.0]), mx.array([0])
    raw = penalties(logits, history, repetition=1.3)
    logged = penalties(logits - mx.logsumexp(logits), history, repetition=1.3)
    assert DOMAIN == "raw logits"
    gap = (raw[0] - raw[1]).item()
    assert gap == pytest.approx(5 / 1.3 - 1)
    assert (logged[0] - logged[1]).item() > gap + 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, h: penalties(x, h, repetition=0), "repetition"),
        (lambda x, h: penalties(x, h, repetition=float("nan")), "repetition"),
        (lambda x, h: penalties(x, h, presence=float("inf")), "presence"),
        (lambda x, h: penalties(x, h, frequency=[1.0]), "frequency"),
        (lambda x, h: penalties(x, h[:1]), "history"),
        (lambda x, h: penalties(x, h[0]), "history"),
        (lambda x, h: penalties(x, h.astype(mx.float32)), "integer"),
        (lambda x, h: penalties(h, h), "logits"),
        (lambda x, h: penalise(x, h), "counts"),
        (lambda x, h: Counts(h, 4).add(mx.array([1])), "one id a row"),
        (lambda x, h: Counts(h, 4).extend(Counts(h, 5)), "4 are expected"),
    ],
)
def test_bad_input_is_one_line(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        call(mx.zeros((2, 4)), mx.zeros((2, 3), dtype=mx.int32))
    assert "\n" not in str(error.value)
