"""What a contract is: an op's signature, its inputs' domain, how a result is judged, and relations that must hold.

A contract knows no framework and no candidate: operands are made and results judged in NumPy. audits/sweep.py runs it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from audits.domain import Case, Choice, Field
from audits.frameworks import DTYPES, LAYOUTS
from audits.kept import once
from audits.verdict import Verdict
from reference.arithmetic import Arithmetic

if TYPE_CHECKING:
    from audits.candidate import Candidate

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a contract: whether it may be left out, and whether it is passed by position."""

    name: str
    optional: bool
    positional: bool


@dataclass(frozen=True)
class Call:
    """The arguments of one call, by name and in the contract's order; optional ones at their default are left out.

    Values are NumPy arrays, tuples of them, numbers, strings or None. key: what they follow from; None where nobody
    says.
    """

    args: Mapping[str, Any]
    key: Hashable = None

    def with_(self, **changed: Any) -> Call:
        """The same call with other values of some arguments."""
        return Call({**self.args, **changed})

    def once(self, what: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, which depends on the arguments and on `what` alone: kept for the next time."""
        return work() if self.key is None else once((self.key, what), work)

    def others(self, what: str, work: Callable[[], Mapping[str, Call]]) -> Mapping[str, Call]:
        """Calls that follow from this one, by name: made once, and what is due for them too."""

        def keyed() -> Mapping[str, Call]:
            return {name: replace(call, key=self.key and (self.key, what, name)) for name, call in work().items()}

        return self.once(what, keyed)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found wrong: its name ("values", "future key", …) and one line with the figures."""

    check: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


# Fields of a case that say how its operands lie in memory and what is asked of the candidate, not what they are.
NOT_BUILT_FROM = ("layout", "operand", "relation")

Outputs = Sequence[Array]
Judge = Callable[[Call, Outputs, Arithmetic], Finding | None]


class Run(Protocol):
    """What a relation gets to call the candidate with: outputs in NumPy; raises what the candidate raises."""

    @property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic that the candidate claims, for relations that hold up to rounding."""
        ...

    @property
    def dtypes(self) -> Sequence[str]:
        """The dtypes that the candidate is tried with, for relations between them."""
        ...

    def __call__(self, call: Call) -> Outputs: ...


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A property that needs no reference: `check` calls the candidate again and says what is wrong, or None.

    `check(run, call, outputs, case)`: `outputs` are those of `call`. `applies` says for which cases it means something,
    `needs` which optional arguments the candidate must take.
    """

    name: str
    check: Callable[[Run, Call, Outputs, Case], str | None]
    applies: Callable[[Case], bool] = lambda case: True
    needs: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Refusable:
    """A part of a domain that honest code need not take: whoever raises on the plainest case with the fields of `case`
    is not asked, in that dtype, for what it `covers`. What it gives there, if it does, is judged like everything else.
    """

    name: str
    case: Case
    covers: Callable[[Case], bool]

    @classmethod
    def setting(cls, **fields: Any) -> Refusable:
        """The cases that have these fields."""
        told = ", ".join(f"{name}={value}" for name, value in fields.items())
        return cls(name=told, case=fields, covers=lambda case: all(case[name] == fields[name] for name in fields))


@dataclass(frozen=True, kw_only=True)
class Contract:
    """An op's contract.

    signature: as a candidate is called, e.g. "softmax(x)". doc: shapes and meaning, first line first. fields: the
    input domain (dtype, layout, operand and seed are added). bases: a few ordinary cases, one for each setting of the
    options; layouts, reruns and relations are tried on these, and every ordered pair of them in one process.
    corpus(full): the boundary cases, always run. build: a case's operands. judge: what is wrong with outputs, by
    the bound of an arithmetic. claims: the arithmetic of an honest candidate for each input dtype. forms: ways in which
    candidates may take their operands, each as fields that are set in every case; the first that a candidate takes is
    used. refusable: parts of the domain that a candidate may refuse. settled: fields that the candidate itself settles,
    such as a decoder's vocabulary. outputs: how many arrays it returns. words: whether None or a name may stand for
    one. dtype_key: cases of one key have outputs of the same dtypes. told: a case as its verdict tells it, where
    operands are larger than a field says; it has the same operands.
    """

    name: str
    signature: str
    doc: str
    fields: Mapping[str, Field]
    bases: Sequence[Case]
    corpus: Callable[[bool], Iterable[Case]]
    build: Callable[[Case], Call]
    judge: Judge
    relations: Sequence[Relation] = ()
    valid: Callable[[Case], bool] = lambda case: True
    claims: Callable[[str], Mapping[str, str]] = lambda dtype: default_claims(dtype)
    forms: Sequence[Case] = ({},)
    refusable: Sequence[Refusable] = ()
    settled: Callable[[Candidate], Case] = lambda candidate: {}
    outputs: Sequence[int] = (1,)
    words: bool = False
    dtype_key: Callable[[Case], str] = lambda case: str(case["dtype"])
    told: Callable[[Case], Case] = lambda case: case
    session: str = ""
    adapt: Callable[[Candidate], Candidate] = lambda candidate: candidate
    examples: int = 40  # cases that Hypothesis draws in a quick run

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What a candidate is called with."""
        return arguments_of(self.session or self.signature)

    def call(self, case: Case) -> Call:
        """The operands of a case."""
        return built(self.build, case)

    def audit(
        self,
        candidate: Candidate,
        *,
        full: bool = False,
        seed: int = 0,
        advance: Callable[[str], None] = lambda _: None,
        shrinking: bool = True,
    ) -> Iterator[Verdict]:
        """Judge a candidate over the whole domain, one verdict a case."""
        from audits.sweep import Sweep

        yield from Sweep(self, candidate, shrinking=shrinking).run(full=full, seed=seed, advance=advance)

    def replay(self, case: Case, candidate: Candidate) -> Verdict:
        """Judge the one case that a verdict recorded."""
        from audits.sweep import replay

        return replay(self, case, candidate)

    @property
    def domain(self) -> Mapping[str, Field]:
        """All fields of a case."""
        common = {
            "layout": Choice(LAYOUTS),
            "operand": Choice(("", *(a.name for a in self.arguments))),
            "seed": Choice(tuple(range(8))),
        }
        dtype = {} if "dtype" in self.fields else {"dtype": Choice(tuple(DTYPES))}
        return {**dtype, **self.fields, **common}


def built(build: Callable[[Case], Call], case: Case) -> Call:
    """The operands of a case as `build` makes them, but made once; arrays that are kept for the next time are
    read-only.
    """
    key = build, repr(sorted((name, value) for name, value in case.items() if name not in NOT_BUILT_FROM))
    return once(key, lambda: replace(build(case), key=key))


def default_claims(dtype: str) -> dict[str, str]:
    """What honest code of `dtype` may round: sums in float32; for half precision, each operand and stored intermediate.

    float32 code computes in float32 throughout.
    """
    if dtype == "float32":
        return {"accumulate": "float32", "intermediate": "float32"}
    return {"operand": "input", "accumulate": "float32", "intermediate": "input"}


@functools.cache
def arguments_of(signature: str) -> tuple[Argument, ...]:
    """The arguments in a signature such as "sdpa(q, k, v, *, scale, mask=None)"."""
    (declared,) = ast.parse(f"def {signature}: pass").body
    assert isinstance(declared, ast.FunctionDef)
    spec = declared.args
    first = len(spec.args) - len(spec.defaults)
    by_place = [Argument(name=a.arg, optional=i >= first, positional=True) for i, a in enumerate(spec.args)]
    by_name = [
        Argument(name=a.arg, optional=default is not None, positional=False)
        for a, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    return (*by_place, *by_name)
