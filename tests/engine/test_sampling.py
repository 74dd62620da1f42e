"""The sampler against a float64 oracle, against itself row by row, and against the faults that batching brings."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.penalties import penalties
from engine.sampling import NOTHING, sampler, shift_invariant

Array = np.ndarray[Any, np.dtype[Any]]
DRAWS = 20_000


def kept(logits: list[float], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """The ids that the filters keep, from their definitions, in float64."""
    x = np.array(logits)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    ids = [
        i
        for rank, i in enumerate(order)
        if (not top_k or rank < top_k) and (top_p == 1 or p[order[:rank]].sum() < top_p) and p[i] >= min_p * p.max()
    ]
    return sorted(i for i in ids if x[i] > -np.inf)


def drawn(logits: list[float], n: int = DRAWS, seed: int = 0, **options: Any) -> Array:
    """How often each id is drawn in n rows of the same logits."""
    ids = sampler(mx.broadcast_to(mx.array(logits), (n, len(logits))), key=mx.random.key(seed), **options)
    assert ids.dtype == mx.int32
    return np.bincount(np.array(ids), minlength=len(logits))


LOGITS = [0.5, 2.0, -1.0, 2.0, 1.0, -3.0, float("-inf"), 0.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": k} for k in (0, 1, 2, 3, 99)),
        *({"top_p": p} for p in (1e-60, 1e-9, 0.3, 0.32, 0.75)),
        *({"min_p": p} for p in (0.3, 0.37, 1.0)),
        {"top_k": 5, "top_p": 0.7, "min_p": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_draws_have_the_tempered_distribution_of_what_the_untempered_filters_keep(
    options: dict[str, Any], temperature: float
) -> None:
    ids = kept(LOGITS, **options)
    p = np.zeros(len(LOGITS))
    p[ids] = np.exp(np.array(LOGITS)[ids] / temperature)
    expected = DRAWS * p / p.sum()
    actual = drawn(LOGITS, temperature=temperature, **options)
    assert sorted(actual.nonzero()[0]) == ids
    # Pearson's chi-squared; its mean is the degrees of freedom n, its deviation sqrt(2n), and the seed is fixed.
    n = len(ids) - 1
    assert ((actual - expected)[ids] ** 2 / expected[ids]).sum() <= n + 5 * np.sqrt(2 * n)


def test_filtering_what_the_temperature_made_would_keep_other_tokens() -> None:
    """The order is part of the contract: at temperature 3, top-p on the tempered row would keep more."""
    logits = [3.0, 2.0, 1.0, 0.0]
    assert kept(logits, top_p=0.7) == [0, 1]
    assert kept([x / 3 for x in logits], top_p=0.7) == [0, 1, 2]
    assert drawn(logits, 500, temperature=3.0, top_p=0.7).nonzero()[0].tolist() == [0, 1]


def test_ties_at_the_boundary_go_to_the_lowest_ids() -> None:
    flat = [1.0] * 6
    for k in range(1, 6):
        assert drawn(flat, 400, top_k=k).nonzero()[0].tolist() == list(range(k))
    assert drawn(flat, 400, top_p=0.5).nonzero()[0].tolist() == [0, 1, 2]
    assert drawn([-0.0, 0.0, -0.0], 100, top_k=1).nonzero()[0].tolist() == [0]


def test_an_option_that_is_off_in_one_row_is_off_there() -> None:
    """Beside a row where it's on, and where rounding or overflow could turn it on by itself."""
    # Row 0's largest probability rounds to 1, so the mass before its other tokens does too; it's hot, and draws all.
    logits = mx.broadcast_to(mx.array([30.0, 0.0, 0.0, 0.0]), (400, 4))
    on = [1.0, 0.5] * 200
    ids = np.array(sampler(logits, temperature=100.0, top_p=on, top_k=[99, 3] * 200, key=mx.random.key(1)))
    assert set(ids[::2]) == {0, 1, 2, 3}
    assert set(ids[1::2]) == {0}
    ids = np.array(sampler(logits, temperature=100.0, top_k=[99, 3] * 200, key=mx.random.key(1)))
    assert set(ids[::2]) == {0, 1, 2, 3}
    assert set(ids[1::2]) == {0, 1, 2}


def test_the_only_kept_token_is_drawn_whatever_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.random, "gumbel", lambda shape, key: mx.full(shape, -mx.inf) + 0 * key[0].astype(mx.float32))
    assert sampler(mx.array([0.0, 1.0, 2.0, 1.0]), top_k=1, key=mx.random.key(0)).item() == 2


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_greedy_takes_the_lowest_id_among_equals(dtype: mx.Dtype) -> None:
    logits = mx.array([[1.0, 3.0, 3.0, 0.0], [-0.0, 0.0, -5.0, -0.0], [-7.0, -9.0, -8.0, -7.0]]).astype(dtype)
    assert sampler(logits, temperature=0).tolist() == [1, 0, 0]
    assert sampler(logits, temperature=0, top_k=1, top_p=0.1, min_p=1).tolist() == [1, 0, 0]


def test_a_temperature_near_zero_draws_among_the_largest_alone() -> None:
    for temperature in (1e-3, 1e-30, 5e-324):
        assert drawn([1.0, 4.0, 3.0, 4.0], 200, temperature=temperature).nonzero()[0].tolist() == [1, 3]


def test_minus_infinity_and_rows_with_nothing_to_draw() -> None:
    inf, nan = float("inf"), float("nan")
    logits = mx.array([[-inf, -inf, -inf], [-inf, -inf, -1e30], [0.0, nan, 1.0], [0.0, inf, 5.0], [-inf, 3e38, -3e38]])
    for temperature, top_k, top_p, min_p in itertools.product((0, 1e-30, 1, 1e30), (0, 1, 2), (1, 0.5), (0, 0.9)):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        ids = sampler(logits, key=mx.random.key(3), **options).tolist()
        assert ids[:4] == [NOTHING, 2, NOTHING, 1], options
        assert ids[4] in (1, 2), options


def test_rows_are_drawn_as_if_alone_wherever_they_stand() -> None:
    """Every row has its own options and key: neighbours, order and batch size change nothing, thresholds included."""
    rng = np.random.default_rng(1)
    B, V = 12, 33
    logits = mx.array(rng.standard_normal((B, V)) * rng.uniform(0.1, 20, (B, 1))).astype(mx.float32)
    keys = mx.stack([mx.random.key(i) for i in range(B)])
    options: dict[str, Any] = {
        "temperature": rng.choice([0, 0.5, 1, 2], B),
        "top_k": rng.choice([0, 1, 5, 20], B),
        "top_p": rng.choice([1, 0.3, 0.9], B),
        "min_p": rng.choice([0, 0.05, 0.5], B),
    }
    together = sampler(logits, key=keys, **options)
    turned = rng.permutation(B)
    shuffled = sampler(
        logits[mx.array(turned)], key=keys[mx.array(turned)], **{name: x[turned] for name, x in options.items()}
    )
    assert shuffled.tolist() == [together[int(b)].item() for b in turned]
    for b in range(B):
        mine = {name: float(x[b]) for name, x in options.items()}
        assert sampler(logits[b : b + 1], key=keys[b : b + 1], **mine).tolist() == [together[b].item()]
    assert len({int(x) for x in np.array(together)}) > 3


def test_a_threshold_over_the_whole_batch_would_be_seen() -> None:
    """A confident row beside a flat one: min-p from the batch's largest logit would leave the flat row empty."""
    logits = mx.array([[50.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    ids = [sampler(logits, min_p=0.1, key=mx.random.key(i)).tolist() for i in range(60)]
    assert {row[0] for row in ids} == {0}
    assert {row[1] for row in ids} == {0, 1, 2, 3}


def test_one_row_reads_the_same_by_item_and_in_bulk() -> None:
    logits = mx.random.normal((1, 64), key=mx.random.key(9))
    for seed in range(30):
        ids = sampler(logits, top_p=0.9, key=mx.random.key(seed))
        assert ids.shape == (1,)
        assert ids.item() == ids.tolist()[0] == np.array(ids)[0]
        scalar = sampler(logits[0], top_p=0.9, key=mx.random.key(seed))
        assert scalar.shape == ()
        assert scalar.item() == ids.item()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 4}, {"min_p": 0.2}, {"temperature": 0.4, "top_k": 9}]
)
@pytest.mark.parametrize("c", [64.0, -64.0, 4096.0])
def test_what_skips_log_softmax_doesnt_see_a_constant(options: dict[str, Any], c: float) -> None:
    assert shift_invariant()
    # Multiples of 2⁻⁸, so that adding c loses nothing and equality is exact.
    logits = mx.round(mx.random.normal((200, 30), key=mx.random.key(5)) * 256) / 256
    key = mx.random.key(6)
    assert mx.array_equal(sampler(logits, key=key, **options), sampler(logits + c, key=key, **options))


def test_what_needs_the_domain_says_so() -> None:
    """Penalties see a constant, so the rule must not let log-softmax come or go with them; nor for an active top-p."""
    logits, history = mx.array([5.0, 4.2, 0.0]), mx.array([0])
    raw = sampler(penalties(logits, history, repetition=1.3), temperature=0)
    logged = sampler(penalties(logits - mx.logsumexp(logits), history, repetition=1.3), temperature=0)
    assert (raw.item(), logged.item()) == (1, 0)
    assert shift_invariant(top_p=[1.0, 1.0])
    more: list[dict[str, Any]] = [{"repetition": 0.7}, {"presence": -0.1}, {"frequency": -0.1}]
    for option in (*more, {"repetition": 1.3}, {"presence": 0.1}, {"frequency": [0.0, 0.1]}, {"top_p": [1.0, 0.9]}):
        assert not shift_invariant(**option)  # type: ignore[arg-type]


def test_top_p_takes_its_own_softmax() -> None:
    """Raw logits whose exponentials overflow or vanish: without normalisation top-p would keep one token, or all."""
    for c in (300.0, -300.0, 0.0):
        assert drawn([c + 1, c + 1, c, c - 8], 400, top_p=0.9).nonzero()[0].tolist() == [0, 1, 2]


def test_keys_decide_the_draw() -> None:
    logits = mx.zeros((3, 1000))
    key = mx.random.key(1)
    again = [sampler(logits, key=key).tolist() for _ in range(2)]
    assert again[0] == again[1]
    assert len(set(again[0])) == 3, "rows of one key share their noise"
    assert sampler(logits, key=mx.random.key(2)).tolist() != again[0]
    mx.random.seed(4)
    free = [sampler(logits).tolist() for _ in range(2)]
    mx.random.seed(4)
    assert free[0] != free[1]
    assert sampler(logits).tolist() == free[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": float("nan")}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": [1.0, 1.1]}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"min_p": [0.1]}, "2 rows"),
        ({"key": mx.zeros((3, 2), mx.uint32)}, "key"),
        ({"key": mx.zeros((2,))}, "key"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        sampler(mx.zeros((2, 5)), **options)
    assert "\n" not in str(error.value)


def test_logits_of_the_wrong_kind_are_refused() -> None:
    for logits in (mx.zeros((1, 2, 3)), mx.zeros((4,), mx.int32)):
        with pytest.raises(ValueError, match="logits"):
            sampler(logits)
