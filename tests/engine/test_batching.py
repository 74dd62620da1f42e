"""Continuous batching against each request alone: joining and leaving, chunks, penalties, draws, prefixes."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine.batching import Batcher, Event, Sampling
from engine.caches.batched import BatchCache
from engine.generate import Engine
from engine.penalties import penalties
from engine.prefix_store import Identity, PrefixStore
from engine.prefixes import Prefixes, take
from engine.rows import Request, Rows
from engine.sampling import sampler
from tests.engine.tiny import make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
PROMPTS = [[int(x) for x in np.random.default_rng(n).integers(0, 61, n)] for n in (1, 2, 7, 20, 13, 3, 31, 6)]
# Each of two runs is within 2e-5 of the formulas in float64 (test_engine_model.py), relative to the largest logit.
TWO_RUNS = 4e-5


class Spied:
    """An engine whose logits are looked at, step by step, on their way out."""

    def __init__(self, model: Engine) -> None:
        self.engine = Engine(self, model.config, dtype=model.dtype, device=model.device, kv=model.kv)  # type: ignore[arg-type]
        self.inner = model.model
        self.logits: list[mx.array] = []

    def __call__(self, tokens: mx.array, caches: Any, probe: Any = None) -> mx.array:
        logits = self.inner(tokens, caches, probe)
        if tokens.shape[1] == 1:
            self.logits.append(logits[:, -1])
        return logits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine.load(make_checkpoint(tmp_path_factory.mktemp("model"), 3), device="cpu")


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Full-attention layers quantised to 8 bits, for the quantised route."""
    folder = make_checkpoint(tmp_path_factory.mktemp("coded"), 3, head_dim=32, attention_sinks=False)
    return engine.load(folder, device="cpu", kv_bits=8, kv_group_size=32)


def alone(model: Engine, prompt: list[int], max_tokens: int, sampling: Sampling | None = None) -> list[int]:
    """One request by the plain loop: single-row caches, one chunk, the sampler on one row."""
    s, said = sampling or Sampling(), list(prompt)
    caches, key = model.caches(), mx.random.key(s.seed)
    for _ in range(max_tokens):
        logits = model.model(mx.array([said if len(said) == len(prompt) else said[-1:]]), caches)[:, -1]
        logits = penalties(
            logits, mx.array([said]), repetition=s.repetition, presence=s.presence, frequency=s.frequency
        )
        key, draw = mx.random.split(key)
        ids = sampler(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, key=draw[None])
        said.append(int(ids.item()))
    return said[len(prompt) :]


@pytest.mark.parametrize("kind", ["model", "coded"])
@pytest.mark.parametrize(("max_rows", "chunk"), [(1, 512), (3, 4), (8, 5), (2, 1), (8, 512)])
def test_every_request_gets_what_it_gets_alone(
    request: pytest.FixtureRequest, kind: str, max_rows: int, chunk: int
) -> None:
    served: Engine = request.getfixturevalue(kind)
    batcher = Batcher(served, max_rows=max_rows, chunk=chunk)
    wanted = {
        batcher.add(prompt, max_tokens=4 + 3 * i): served.generate(prompt, max_tokens=4 + 3 * i)
        for i, prompt in enumerate(PROMPTS)
    }
    assert batcher.complete() == wanted
    assert not batcher.busy


def logits_by_step(model: Engine, prompt: list[int], neighbours: list[list[int]]) -> list[Array]:
    """The logits of 24 steps of one row, while neighbours come and go, the last of them before the row does."""
    spied = Spied(model)
    batcher = Batcher(spied.engine, max_rows=3, chunk=4)
    if neighbours:
        batcher.add(neighbours.pop(), max_tokens=12)
    number = batcher.add(prompt, max_tokens=24)
    found = []
    for step in itertools.count():
        if step % 4 == 1 and neighbours:
            batcher.add(neighbours.pop(), max_tokens=3)
        rows = [event.request for event in batcher.step()]
        if number in rows:
            found.append(np.array(spied.logits[-1])[rows.index(number)])
        if not batcher.busy:
            break
    assert len(found) == 24
    return found


def test_logits_of_a_row_are_its_own_within_twice_the_arithmetics_bound(model: Engine) -> None:
    """Neighbours come, go and are longer: the row's logits are compared in every step, not only its tokens."""
    prompt, others = PROMPTS[2], [PROMPTS[6], PROMPTS[0], PROMPTS[3]]
    pairs = list(zip(logits_by_step(model, prompt, others), logits_by_step(model, prompt, []), strict=True))
    largest = max(np.abs(b).max() for _, b in pairs)
    assert max(np.abs(a - b).max() for a, b in pairs) / largest < TWO_RUNS
    # Greedy tokens are equal because every margin here is above the bound, as the contract says.
    assert min(np.diff(np.sort(b)[-2:])[0] for _, b in pairs) > 2 * TWO_RUNS * largest
    assert [a.argmax() for a, _ in pairs] == [b.argmax() for _, b in pairs]


def test_our_own_kernels_serve_rows_of_different_lengths(tmp_path: Path) -> None:
    """Positions, masks and experts of a batch by the kernels, whose products round their factors to half."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4}
    ours = engine.load(make_checkpoint(tmp_path / "model", gguf="Q4_K", **sizes), dtype="float32", kernels="host")
    together = logits_by_step(ours, PROMPTS[2], [PROMPTS[6], PROMPTS[0], PROMPTS[3]])
    pairs = list(zip(together, logits_by_step(ours, PROMPTS[2], []), strict=True))
    assert max(np.abs(a - b).max() for a, b in pairs) < 1e-3 * max(np.abs(b).max() for _, b in pairs)


@pytest.mark.parametrize("fault", ["no right padding", "no finalize", "a step behind"])
def test_planted_faults_change_a_neighbours_tokens(model: Engine, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "no right padding":
        monkeypatch.setattr(BatchCache, "prepare", lambda *_, **__: None)
    elif fault == "no finalize":
        # Rows keep the padding at their end: what joins later can't, and what decodes sees it.
        monkeypatch.setattr(BatchCache, "finalize", lambda self: setattr(self, "_limits", None))
    else:
        monkeypatch.setattr(BatchCache, "offset", property(lambda self: mx.array(self._offsets) * 0 + self.size()))
    batcher = Batcher(model, max_rows=4, chunk=4)
    numbers = [batcher.add(prompt, max_tokens=8) for prompt in PROMPTS[:4]]
    found = batcher.complete()
    wanted = [model.generate(prompt, max_tokens=8) for prompt in PROMPTS[:4]]
    assert [found[n] for n in numbers] != wanted


def test_draws_and_penalties_are_the_requests_own(model: Engine) -> None:
    """Same seed, same tokens: alone, among others, in another place, joined later."""
    options = [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_k=8, repetition=1.4, seed=6),
        Sampling(repetition=1.5, presence=0.5, frequency=0.3),
        Sampling(temperature=2.0, top_p=0.8, min_p=0.02, seed=2**40 + 1),
        Sampling(),
    ]
    requests = [(prompt, options[i % 5]) for i, prompt in enumerate(PROMPTS[1:])]
    # Of different lengths, so that rows leave from among others; the longest in the middle.
    length = [5, 12, 7, 14, 9, 6, 11]
    wanted = [alone(model, prompt, n, sampling) for (prompt, sampling), n in zip(requests, length, strict=True)]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    for chunk in (None, 3):
        found = [
            model.generate(prompt, max_tokens=n, sampling=sampling, chunk=chunk)
            for (prompt, sampling), n in zip(requests, length, strict=True)
        ]
        assert found == wanted
    for order, max_rows in ((range(7), 7), (range(6, -1, -1), 3), ((3, 0, 6, 2, 5, 1, 4), 2)):
        batcher = Batcher(model, max_rows=max_rows, chunk=6)
        numbers = {i: batcher.add(requests[i][0], max_tokens=length[i], sampling=requests[i][1]) for i in order}
        found = batcher.complete()
        assert [found[numbers[i]] for i in range(7)] == wanted


@pytest.mark.parametrize("name", ["repetition", "presence", "frequency"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_penalty_alone_is_enough(model: Engine, name: str, sign: int) -> None:
    """Above and below what leaves the logits alone, in a batch whose other row has none."""
    only = Sampling(**{name: 3.0**sign if name == "repetition" else 2.0 * sign})
    wanted = alone(model, PROMPTS[4], 12, only)
    assert wanted != model.generate(PROMPTS[4], max_tokens=12)
    assert model.generate(PROMPTS[4], max_tokens=12, sampling=only) == wanted
    batcher = Batcher(model)
    numbers = batcher.add(PROMPTS[3], max_tokens=12), batcher.add(PROMPTS[4], max_tokens=12, sampling=only)
    found = batcher.complete()
    assert [found[n] for n in numbers] == [model.generate(PROMPTS[3], max_tokens=12), wanted]


def test_generate_refuses_and_ends_as_the_batcher_does(model: Engine) -> None:
    stop = model.generate(PROMPTS[4], max_tokens=9, sampling=Sampling(temperature=1.0, seed=3))[5]
    for options in ({"stop": (stop,)}, {}):
        batcher = Batcher(model)
        number = batcher.add(PROMPTS[4], max_tokens=9, sampling=Sampling(temperature=1.0, seed=3), **options)
        found = model.generate(PROMPTS[4], max_tokens=9, sampling=Sampling(temperature=1.0, seed=3), **options)
        assert found == batcher.complete()[number]
    fed = []
    for options in ({"top_p": 0}, {"repetition": -1}, {"seed": -1}, {"top_k": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            model.generate([1], max_tokens=1, sampling=Sampling(**options), tap=lambda name, x: fed.append(name))
    assert fed == [], "refused before anything is computed"

    spied = Spied(model)
    inner, calls = spied.inner, itertools.count()
    spied.inner = lambda *args: inner(*args) + (mx.nan if next(calls) == 2 else 0)  # type: ignore[assignment]
    assert spied.engine.generate([1, 2], max_tokens=4) == model.generate([1, 2], max_tokens=2)


def test_penalties_are_taken_in_float32_whatever_the_run(model: Engine) -> None:
    """256 − 0.9 in bfloat16 is 255, a tie that goes to the other token."""
    request = Request(number=1, prompt=[1], max_tokens=1, stop=frozenset(), sampling=Sampling(presence=0.9))
    assert Rows([request], V=2).choose(mx.array([[255.0, 256.0]], dtype=mx.bfloat16)).item() == 1


def test_requests_come_while_others_run_and_events_say_what_happens(model: Engine) -> None:
    batcher = Batcher(model, max_rows=2, chunk=8)
    first = batcher.add(PROMPTS[2], max_tokens=6)
    seen: list[Event] = []
    late: list[int] = []
    for event in batcher.run():
        seen.append(event)
        if len(late) < 2:
            late.append(batcher.add(PROMPTS[3 + len(late)], max_tokens=2))
    for number, prompt, n in ((first, PROMPTS[2], 6), (late[0], PROMPTS[3], 2), (late[1], PROMPTS[4], 2)):
        mine = [event for event in seen if event.request == number]
        assert [event.token for event in mine] == model.generate(prompt, max_tokens=n)
        assert [event.reason for event in mine] == [""] * (n - 1) + ["length"]


def test_the_record_says_in_what_domain_and_order_tokens_are_chosen(model: Engine) -> None:
    record = Batcher(model).provenance
    assert record["sampling"]["penalties"] == "raw logits"
    assert "untempered" in record["sampling"]["filters"]
    assert record["engine"] == "mlx"


def test_stop_tokens_end_a_row_and_arent_given(model: Engine) -> None:
    whole = model.generate(PROMPTS[4], max_tokens=12)
    stop = whole[4]
    batcher = Batcher(model)
    number = batcher.add(PROMPTS[4], max_tokens=12, stop={stop})
    other = batcher.add(PROMPTS[3], max_tokens=12)
    events = list(batcher.run())
    mine = [event for event in events if event.request == number]
    assert [e.token for e in mine] == [*whole[: whole.index(stop)], None]
    assert mine[-1].reason == "stop"
    assert [e.token for e in events if e.request == other] == model.generate(PROMPTS[3], max_tokens=12)


def test_a_row_with_nothing_to_draw_ends_alone(model: Engine) -> None:
    """NaN logits in one row: it's over, and the others don't notice."""
    spied = Spied(model)
    poison = mx.array([[0.0], [float("nan")]])
    inner, steps = spied.inner, itertools.count()

    def poisoned(tokens: mx.array, caches: Any, probe: Any = None) -> mx.array:
        logits = inner(tokens, caches, probe)
        return logits + poison[:, None] if tokens.shape == (2, 1) and next(steps) == 3 else logits

    spied.inner = poisoned  # type: ignore[assignment]
    batcher = Batcher(spied.engine)
    good, bad = (batcher.add(prompt, max_tokens=9) for prompt in PROMPTS[2:4])
    events = list(batcher.run())
    assert [e.reason for e in events if e.request == bad] == ["", "", "", "no token"]
    assert [e.token for e in events if e.request == good] == model.generate(PROMPTS[2], max_tokens=9)


@pytest.mark.parametrize("moment", [0, 1, 3, 6])
@pytest.mark.parametrize("which", [0, 1])
def test_a_cancelled_request_is_gone_wherever_it_was(model: Engine, moment: int, which: int) -> None:
    batcher = Batcher(model, max_rows=2, chunk=8)
    prompts = [PROMPTS[i] for i in (3, 6, 4)]
    numbers = [batcher.add(prompt, max_tokens=8) for prompt in prompts]
    events = [event for _ in range(moment) for event in batcher.step()]
    assert batcher.cancel(numbers[which])
    assert not batcher.cancel(numbers[which])
    rest = list(batcher.run())
    assert numbers[which] not in {event.request for event in rest}
    for i in {0, 1, 2} - {which}:
        found = [event.token for event in events + rest if event.request == numbers[i]]
        assert found == model.generate(prompts[i], max_tokens=8)
    assert not batcher.cancel(99)


def test_the_only_request_is_cancelled_in_the_middle_of_its_prefill(model: Engine) -> None:
    batcher = Batcher(model, chunk=8)
    number = batcher.add(PROMPTS[6], max_tokens=3)
    assert batcher.step() == []
    assert batcher.cancel(number)
    assert not batcher.busy
    other = batcher.add(PROMPTS[2], max_tokens=3)
    assert batcher.complete() == {other: model.generate(PROMPTS[2], max_tokens=3)}


def test_a_row_decodes_in_the_step_of_its_last_chunk_and_no_chunk_waits(model: Engine) -> None:
    batcher = Batcher(model, chunk=10)
    batcher.add(PROMPTS[6], max_tokens=2)
    for _ in range(2):
        assert batcher.step() == []
        assert batcher._joining is not None
        graph = io.StringIO()
        mx.export_to_dot(graph, *(x for cache in batcher._joining.rows.caches for x in cache._slots.arrays))
        assert "rectangle" not in graph.getvalue(), "a chunk is yet to be computed"
    assert [event.token for event in batcher.step()] == model.generate(PROMPTS[6], max_tokens=1)


def test_prefixes_warm_a_batch_and_change_nothing(model: Engine, coded: Engine, tmp_path: Path) -> None:
    shared = PROMPTS[6]
    prompts = [shared, [*shared, 4, 5, 6], [*shared[:-1], 9, 9], PROMPTS[3], shared]
    for served in (model, coded):
        wanted = [served.generate(prompt, max_tokens=7) for prompt in prompts]
        identity = Identity(model_id=f"tiny-{served.kv}", quant_bits=8 if served.kv else 0, ctx=4096, dtype="float32")
        for source in (Prefixes(1 << 20), PrefixStore(tmp_path, identity=identity, max_bytes=1 << 20)):
            fed = []
            for _ in range(2):
                spied = Spied(served)
                inner, tokens_fed = spied.inner, []

                def counted(tokens: mx.array, caches: Any, probe: Any = None, inner: Any = inner) -> mx.array:
                    tokens_fed.append(tokens.size)  # noqa: B023 - used within the iteration
                    return inner(tokens, caches, probe)  # type: ignore[no-any-return]

                spied.inner = counted  # type: ignore[assignment]
                batcher = Batcher(spied.engine, max_rows=2, chunk=8, prefixes=source)
                numbers = [batcher.add(prompt, max_tokens=7) for prompt in prompts]
                found = batcher.complete()
                assert [found[n] for n in numbers] == wanted
                fed.append(sum(tokens_fed))
            assert fed[1] < 0.6 * fed[0]


def test_a_prefix_that_was_found_isnt_put_again(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    source, put = Prefixes(1 << 20), []
    monkeypatch.setattr(
        source, "put", lambda checkpoint: put.append(checkpoint.token_count) or Prefixes.put(source, checkpoint)
    )
    for prompt in (PROMPTS[3], PROMPTS[3], PROMPTS[0], [*PROMPTS[3], 1, 2]):
        batcher = Batcher(model, prefixes=source)
        batcher.add(prompt, max_tokens=2)
        batcher.complete()
    assert put == [19, 21]


def test_a_stored_prefix_of_another_model_starts_cold_and_is_discarded(model: Engine, tmp_path: Path) -> None:
    """Two models under one id: the shapes tell, and the file is gone, or every prompt would stumble over it."""
    other = engine.load(make_checkpoint(tmp_path / "other", 4, num_key_value_heads=1), device="cpu")
    identity = Identity(model_id="the same", quant_bits=0, ctx=4096, dtype="float32")
    store = PrefixStore(tmp_path / "store", identity=identity, max_bytes=1 << 20)
    caches = other.caches()
    mx.eval(other.model(mx.array([PROMPTS[3][:-1]]), caches))
    assert store.put(take(PROMPTS[3][:-1], caches))
    batcher = Batcher(model, prefixes=store)
    number = batcher.add(PROMPTS[3], max_tokens=5)
    assert batcher.complete()[number] == model.generate(PROMPTS[3], max_tokens=5)
    found = store.find(PROMPTS[3])
    assert found is not None
    assert found.checkpoint.layers[0].keys[0].shape[1] == 2, "replaced by this model's own"


def test_bad_requests_are_refused_before_they_join(model: Engine) -> None:
    batcher = Batcher(model)
    for call, says in (
        (lambda: batcher.add([], max_tokens=1), "empty"),
        (lambda: batcher.add([61], max_tokens=1), "vocabulary"),
        (lambda: batcher.add([1], max_tokens=0), "max_tokens"),
        (lambda: batcher.add([1], max_tokens=1, sampling=Sampling(top_p=0)), "top_p"),
        (lambda: batcher.add([1], max_tokens=1, sampling=Sampling(repetition=-1)), "repetition"),
        (lambda: batcher.add([1], max_tokens=1, sampling=Sampling(seed=-1)), "seed"),
        (lambda: Batcher(model, max_rows=0), "max_rows"),
        (lambda: Batcher(model, chunk=0), "chunk"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
    assert not batcher.busy
