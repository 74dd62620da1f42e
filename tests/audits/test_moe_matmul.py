"""The wide-tile audit: its data can see what uniform data can't, and the published defect comes out cell for cell."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import assay
from audits.catalogue import replay
from audits.kernel_spec import GUIDE, KernelSpec, evaluate, packed, read_specs
from audits.moe_matmul import LOADS, OWN, MatmulCase, build, cases, expert_pairs, mismatch, problem, routing, run_case
from audits.mutants import Mutant, catch, plant, read_mutants
from engine.metal.library import Library

MUTANTS = Path(__file__).parent.parent / "mutants" / "moe_matmul"
# The published table: mismatching elements of M = 64, K = 256, one expert, by tokens and tile.
PUBLISHED = {
    1: (0, 0, 0),
    32: (0, 0, 0),
    33: (0, 64, 64),
    64: (0, 2048, 2048),
    65: (0, 2048, 2112),
    96: (0, 2048, 4096),
    128: (0, 4096, 6144),
}


def mutant(name: str) -> Mutant:
    return next(one for one in read_mutants(MUTANTS) if one.name == name)


@pytest.fixture(scope="module")
def defective(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], KernelSpec]:
    folder = tmp_path_factory.mktemp("wide")
    specs = plant(mutant("wide_tile_large_staging"), OWN, folder)
    return {(spec.format, spec.tile): spec for spec in specs if spec.rhs == "f32"}


def clear_of_zero(spec: KernelSpec, case: MatmulCase) -> MatmulCase:
    """The case with the first seed for which a zero is within no element's bound: else a zero could be right by
    chance.
    """
    for seed in range(100):
        tried = replace(case, seed=seed)
        work = problem(spec, tried)
        if (np.abs(work.expected) > work.bound).all():
            return tried
    raise AssertionError("no seed gives operands whose results are all clear of zero")


@pytest.mark.parametrize("poison", [True, False], ids=["NaN-poisoned", "zero-filled"])
@pytest.mark.parametrize("kind", ["q4_K", "q2_K", "iq2_xxs"])
def test_the_published_table_comes_out_cell_for_cell(
    defective: dict[tuple[str, int], KernelSpec], kind: str, poison: bool
) -> None:
    found = {}
    for tokens in PUBLISHED:
        verdicts = []
        for tile in (32, 64, 128):
            spec = defective[kind, tile]
            case = MatmulCase(kernel=spec.name, tokens=tokens, K=256, M=64, load="one", seed=0, poison=poison)
            verdicts.append(run_case(spec, clear_of_zero(spec, case)))
        found[tokens] = tuple(v.evidence["elements"] for v in verdicts)
        for verdict in verdicts:
            assert verdict.evidence["first_bad_token"] in (None, 32)
            assert verdict.evidence["boundary"] in (None, 32)
    assert found == PUBLISHED


def test_the_published_defect_with_its_own_staging_reads_past_the_end(tmp_path: Path) -> None:
    spec = next(
        s for s in plant(mutant("wide_tile"), OWN, tmp_path) if (s.format, s.rhs, s.tile) == ("q4_K", "f32", 64)
    )
    case = MatmulCase(kernel=spec.name, tokens=64, K=256, M=64, load="one", seed=0, checked=True)
    fault = run_case(spec, case).evidence["faults"][0]
    assert (fault["kind"], fault["address_space"], fault["buffer"]) == ("out-of-bounds-read", "threadgroup", 0)
    line = (tmp_path / "moe.metal").read_text().splitlines()[fault["line"] - 1]
    assert "to[row] = result[NR0 * token + row]" in line


def sampled(specs: list[KernelSpec]) -> Iterator[tuple[KernelSpec, MatmulCase]]:
    """Every format and tile at one ragged size each: tests of the audit, not the audit itself."""
    for i, spec in enumerate(specs):
        yield (
            spec,
            MatmulCase(kernel=spec.name, tokens=spec.tile + 1, K=512, M=70, load=LOADS[i % len(LOADS)], seed=1),
        )


def test_our_own_kernels_pass_at_ragged_sizes() -> None:
    for spec, case in sampled(read_specs(OWN)):
        verdict = run_case(spec, case)
        assert verdict.outcome == "pass", verdict.message
        assert verdict.evidence["kernel"] == spec.name, "the report names the kernel that ran"


@pytest.mark.parametrize("name", [one.name for one in read_mutants(MUTANTS)])
def test_a_planted_bug_is_caught_by_the_check_it_is_for(name: str) -> None:
    found = catch(mutant(name), OWN)
    assert found.ok, f"caught by {sorted(found.messages)} only, {found.mutant.caught_by} had to"


def test_the_original_is_clean_so_a_catch_means_something() -> None:
    nothing = Mutant(name="original", title="", caught_by=(), edits=(), overrides={})
    assert catch(nothing, OWN).messages == {}


def test_an_edit_that_no_longer_fits_is_an_error(tmp_path: Path) -> None:
    stale = replace(mutant("same_block"), edits=(("no such text", "x", 1),))
    with pytest.raises(ValueError, match="occurs 0 times"):
        plant(stale, OWN, tmp_path)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tokens", [1, 33, 128])
def test_the_fullest_expert_has_as_many_tokens_as_asked_for(load: str, tokens: int) -> None:
    ids, experts = routing(load, tokens, np.random.default_rng(0))
    assert all(len(set(row)) == len(row) for row in ids.tolist()), "a token visits an expert once"
    assert np.bincount(ids.reshape(-1), minlength=experts).max() == tokens
    if load == "empty":
        assert 0 in np.bincount(ids.reshape(-1), minlength=experts)


def test_pairs_are_ascending_and_complete() -> None:
    counts, pairs = expert_pairs(np.array([[1, 0], [0, 2], [1, 2]]), 4)
    assert counts.tolist() == [2, 2, 2, 0]
    assert [pairs[e, : counts[e]].tolist() for e in range(4)] == [[1, 2], [0, 4], [3, 5], []]


def test_every_token_has_another_x_and_expected_values_differ() -> None:
    spec = read_specs(OWN)[0]
    work = problem(spec, MatmulCase(kernel=spec.name, tokens=33, K=256, M=70, load="one", seed=0))
    assert len(np.unique(work.arrays["x"], axis=0)) == 33
    assert len(np.unique(work.expected[:, 0], axis=0)) == 33
    assert (work.bound < 0.02 * np.abs(work.expected).mean()).all(), "a wrong token can't hide in the bound"


def test_the_boundary_is_named_only_where_it_explains_every_bad_token() -> None:
    ids = np.zeros((70, 1), dtype=np.int64)
    wrong = np.zeros((70, 1, 4), dtype=bool)
    wrong[32:64] = True
    assert mismatch(wrong, ids, 64)["boundary"] == 32
    wrong[5] = True
    assert mismatch(wrong, ids, 64)["boundary"] is None
    assert mismatch(wrong, ids, 64)["first_bad_token"] == 5


def test_a_verdict_replays_from_its_json() -> None:
    spec = read_specs(OWN)[0]
    verdict = run_case(spec, MatmulCase(kernel=spec.name, tokens=33, K=256, M=70, load="skewed", seed=3))
    (again,) = replay(json.loads(json.dumps({**verdict.case, "candidate": None}))).verdicts
    assert (again.outcome, again.evidence["elements"]) == (verdict.outcome, verdict.evidence["elements"])


def test_quick_meets_every_boundary_of_every_kernel() -> None:
    specs = read_specs(OWN)
    swept = list(cases(specs, full=False, seed=0))
    for spec in specs:
        own = [case for s, case in swept if s is spec]
        assert {1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129} <= {case.tokens for case in own}
        assert {256, 512, 1024} == {case.K for case in own}
        assert {"one", "even", "skewed", "empty"} == {case.load for case in own}
        assert any(case.checked for case in own)


@pytest.mark.parametrize(
    ("text", "value"), [("ceil(n, tile)", 3), ("256 * tile", 16384), ("K // 2 - 1", 127), ("min(n, max(K, M))", 130)]
)
def test_expressions(text: str, value: int) -> None:
    assert evaluate(text, {"n": 130, "tile": 64, "K": 256, "M": 70}) == value


@pytest.mark.parametrize(
    "text", ["__import__('os')", "n.real", "n ** 2", "1.5", "x", "n if n else 1", "ceil(n", "f(n)"]
)
def test_expressions_are_nothing_but_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        evaluate(text, {"n": 3})


def test_scalars_are_laid_out_as_c_does() -> None:
    assert packed(("i32 n", "u64 K", "i16 1"), {"n": 1, "K": 2}) == (
        b"\1\0\0\0\0\0\0\0" + b"\2\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0"
    )


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (('source = "moe.metal"', ""), "source"),
        (('"weights"', '"wheights"'), "wheights"),
        (('5 = "out"', ""), "out"),
        (('"q4_K"', '"q5_9"'), "q5_9"),
        (("[[kernel]]", "[[kernel]"), "moe.toml"),
        (("tile = [", "rows = []\ntile = ["), "rows is"),
        (("[[kernel]]", "[kernel]"), r"each begins with \[\[kernel\]\]"),
        (("threads = [128, 1, 1]", "threads = 128"), "threads is 128; a list"),
        (("threads = [128, 1, 1]", 'threads = ["x", 1, 1]'), "numbers of threads from 1 on"),
        (("threads = [128, 1, 1]", "threads = [128, 1, 1]\nrow = [3]"), "there is no key 'row'; there is buffers"),
        (('source = "moe.metal"', 'source = "moe.metal"\nrows = [64]'), "there is no key 'rows'"),
        (
            ('source = "moe.metal"', 'source = "moe.metal"\ninclude_dirs = "headers"'),
            "include_dirs is 'headers'; a list",
        ),
        (('source = "moe.metal"', 'source = "moe.metal"\ndefines = 3'), "of another type"),
        (('["ceil(n, tile)",', "["), "threadgroups is .*; three expressions"),
        (("tile = [32,", 'tile = ["32",'), "numbers of tokens from 1 on"),
        (('rhs = ["f32", "f16"]', 'rhs = "f32"'), "rhs is 'f32'; a list"),
        (('0 = ["i32 K",', "0 = [3,"), "a scalar is 3"),
        (('1 = "weights"', 'one = "weights"'), "go by their index"),
        (('format = ["q8_0", "q4_K", "q2_K", "iq2_xxs"]', "format = []"), "describes no kernel"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path: Path, edit: tuple[str, str], told: str) -> None:
    path = tmp_path / "moe.toml"
    assert edit[0] in OWN.read_text()
    path.write_text(OWN.read_text().replace(*edit))
    with pytest.raises(ValueError, match=told) as error:
        read_specs(path)
    assert GUIDE in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no file"),
        (b"source = \xff", "can't be read as a TOML file"),
        (b"source = ", "is no TOML: Invalid value"),
        (b"", "the key 'kernel' is missing"),
    ],
)
def test_a_file_that_is_no_description_says_where_one_is(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        read_specs(path)
    assert str(path) in str(error.value)
    assert GUIDE in str(error.value)
    with pytest.raises(ValueError, match="can't be read as a TOML file"):
        read_specs(tmp_path)


def test_a_description_without_its_source_says_so(tmp_path: Path) -> None:
    path = tmp_path / "moe.toml"
    path.write_text(OWN.read_text())
    with pytest.raises(ValueError, match=r"moe.metal is no file; a source lies beside the TOML file"):
        read_specs(path)


@pytest.mark.parametrize("text", ["n // 0", "ceil(n)", "min()"])
def test_an_expression_that_has_no_value_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="can't be computed"):
        evaluate(text, {"n": 1})


def test_a_scalar_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="'i16 n' doesn't fit: it is 40000"):
        packed(("i16 n",), {"n": 40000})


def test_a_description_gives_function_constants_and_rows(tmp_path: Path) -> None:
    call = "    mul_mm_id<Block, X, NR1>(args,"
    kernels = (OWN.parent / "moe.metal").read_text()
    assert kernels.count(call) == 1
    constant = "constant bool idle [[function_constant(600)]];\n"
    head = "template <typename Block, typename X, short NR1>\nkernel void kernel_mul_mm_id("
    assert kernels.count(head) == 1
    kernels = kernels.replace(head, constant + head).replace(call, "    if (idle) { return; }\n" + call)
    (tmp_path / "moe.metal").write_text(kernels)
    for key, idle, outcome in (("idle", "false", "pass"), ("600", "true", "fail")):
        given = f'source = "moe.metal"\ninclude_dirs = ["{OWN.parent}"]\nconstants = {{ {key} = {idle} }}'
        text = OWN.read_text().replace('source = "moe.metal"', given)
        (tmp_path / "moe.toml").write_text(text.replace("tile = [", "rows = [64, 100]\ntile = ["))
        spec = read_specs(tmp_path / "moe.toml")[0]
        swept = list(cases([spec], full=False, seed=0))
        assert {case.M for _, case in swept} == {64, 100}
        assert run_case(*swept[0]).outcome == outcome


def test_the_public_audit_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="no contract 'nonsense'"):
        assay.audit("nonsense")
    with pytest.raises(ValueError, match=r"FILE\.py:NAME is expected"):
        assay.audit("moe_matmul", candidate="kernels.py")


def test_all_kernels_of_a_library_are_compiled_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, a first run would take minutes: nothing is left to compile case by case."""
    asked: list[tuple[bool, list[str]]] = []
    original = Library.build
    monkeypatch.setattr(
        Library, "build", lambda self, names: (asked.append((self.checked, names)), original(self, names))[1]
    )
    specs = [spec for spec in read_specs(OWN) if spec.format == "q8_0" and spec.tile == 32]
    swept = [(s, c) for s, c in cases(specs, full=False, seed=0) if c.tokens in (1, 33)]
    build(swept)
    assert sorted((checked, sorted(set(names))) for checked, names in asked) == [
        (False, sorted(spec.name for spec in specs)),
        (True, sorted(spec.name for spec in specs)),
    ]
