"""Every contract by name, and what `assay audit` and `assay.audit` do with it: pick a candidate, sweep, report.

A contract is a module in audits/contracts/ with a `CONTRACT`; being there is all the registration there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol

import audits.contracts as package
from audits import moe_matmul
from audits.candidate import Candidate, load, one_line
from audits.contract import Argument
from audits.errors import InternalError
from audits.frameworks import DTYPES, LAYOUTS
from audits.interrupts import told_apart
from audits.verdict import Report, Verdict, replay_command
from reference.arithmetic import Arithmetic

Advance = Callable[[str], None]
BUILT_IN = "built-in"


class Auditable(Protocol):
    """What the catalogue needs of a contract, stateless (audits/contract.py) or stateful (audits/cache_contract.py)."""

    @property
    def name(self) -> str: ...
    @property
    def signature(self) -> str: ...
    @property
    def doc(self) -> str: ...
    @property
    def arguments(self) -> tuple[Argument, ...]: ...
    @property
    def relations(self) -> Sequence[Any]: ...

    def audit(
        self, candidate: Candidate, *, full: bool, seed: int, advance: Advance, shrinking: bool = True
    ) -> Iterator[Verdict]: ...
    def replay(self, case: Mapping[str, Any], candidate: Candidate) -> Verdict: ...


def names() -> list[str]:
    """The names of all contracts: their modules' names."""
    return [found.name for found in iter_modules(package.__path__)]


def contract(name: str) -> Auditable:
    """The contract of that name; ValueError if there is none."""
    if name not in names():
        raise ValueError(f"no contract {name!r}; there is {', '.join(names())}")
    found: Auditable = import_module(f"{package.__name__}.{name}").CONTRACT
    return found


def contracts() -> Mapping[str, Auditable]:
    """Every contract by name."""
    return {name: contract(name) for name in names()}


@told_apart()
def audit(
    wanted: str | Sequence[str] | None,
    candidate: Any = None,
    *,
    framework: str | None = None,
    device: str | None = None,
    claims: Mapping[str, str] | None = None,
    dtypes: str | Sequence[str] = (),
    layouts: str | Sequence[str] = (),
    full: bool = False,
    seed: int = 0,
    advance: Advance = lambda _: None,
    at: Advance = lambda _: None,
) -> Report:
    """Judge a candidate (None: the engine's own) by the named contracts (none: all); ValueError for bad input.

    advance: called with each step, for people. at: called with each case before it runs, for whoever must say which
    one a candidate did not come back from. A contract that can't judge loses nothing of the others.
    """
    wanted = _listed("contracts", wanted or ())
    if not wanted and candidate is not None:
        raise ValueError("name the contract that the candidate is judged by")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed is {seed!r}; a whole number from 0 on is expected")
    chosen = list({one.name: one for one in map(contract, wanted or names())}.values())
    for name in candidate if isinstance(candidate, Mapping) else ():
        contract(name)
    _check_claims(claims)
    told = _Told(
        framework=framework,
        device=device,
        claims=claims,
        dtypes=_chosen("dtype", dtypes, DTYPES),
        layouts=_chosen("layout", layouts, LAYOUTS),
        at=at,
    )
    verdicts: list[Verdict] = []
    judging = [(one, list(_judges(one, candidate, told))) for one in chosen]  # bad input shows before anything runs
    for i, (one, judges) in enumerate(judging):
        for judge in judges:
            at(f"the start of {one.name}")
            try:
                for verdict in judge(full, seed, lambda text, i=i: advance(f"{i + 1}/{len(chosen)} {text}")):  # type: ignore[misc]  # mypy can't infer a lambda's default
                    verdicts.append(verdict)  # one by one: an error takes none of them along
            except Exception as error:
                if isinstance(error, ValueError | OSError) and not verdicts and len(chosen) == 1:
                    raise
                verdicts.append(_unjudged(one, candidate, error))
    return Report(verdicts=verdicts)


def _unjudged(one: Auditable, candidate: Any, error: Exception) -> Verdict:
    """The verdict of a contract that could not go on."""
    given = candidate.get(one.name) if isinstance(candidate, Mapping) else candidate
    case = {"contract": one.name, "candidate": BUILT_IN if given is None else _place(given)}
    if isinstance(error, ValueError | OSError):
        return Verdict(outcome="could-not-judge", audit=one.name, case=case, message=one_line(error))
    ours = InternalError(error)
    return Verdict(outcome="could-not-judge", audit=one.name, case=case, message=str(ours), evidence=ours.evidence)


class _Told:
    """What the caller says of a candidate."""

    def __init__(
        self,
        *,
        framework: str | None,
        device: str | None,
        claims: Mapping[str, str] | None,
        dtypes: tuple[str, ...] = (),
        layouts: tuple[str, ...] = (),
        at: Advance = lambda _: None,
    ) -> None:
        self.framework, self.device, self.claims = framework, device, dict(claims or {})
        self.dtypes, self.layouts = dtypes, ("contiguous", *layouts) if layouts else LAYOUTS
        self.at = at

    def case(self, case: Mapping[str, Any]) -> None:
        """Say which case runs next."""
        self.at(f"{case['contract']}; replay: {replay_command(case)}")

    @property
    def of_python(self) -> list[str]:
        """What was said that means something for Python candidates alone."""
        said = {"framework": self.framework, "device": self.device, "claims": self.claims, "dtype": self.dtypes}
        return [name for name, value in said.items() if value or value == ""] + ["layout"] * (self.layouts != LAYOUTS)


Judging = Callable[[bool, int, Advance], Iterable[Verdict]]


def _judges(one: Auditable, candidate: Any, told: _Told) -> Iterator[Judging]:
    """What has to run: the sweep of a Python candidate, and for Metal kernels of routed matmuls the wide-tile audit."""
    kernels = isinstance(candidate, str | Path) and Path(candidate).suffix == ".toml"
    if one.name == moe_matmul.NAME and (kernels or candidate is None):
        if kernels and told.of_python:
            raise ValueError(
                f"{candidate} describes Metal kernels, which run on the host CPU; {', '.join(told.of_python)} can be"
                " chosen for a Python candidate alone: leave it out"
            )
        yield lambda full, seed, advance: moe_matmul.audit(candidate, full=full, seed=seed, advance=advance)
    elif kernels:
        raise ValueError(
            f"{candidate} describes Metal kernels, which {moe_matmul.NAME} judges; {one.name} takes Python"
        )
    if not kernels:
        made = _candidate(one.name, candidate, told)
        yield lambda full, seed, advance: one.audit(made, full=full, seed=seed, advance=advance)


def _candidate(name: str, given: Any, told: _Told) -> Candidate:
    """The Candidate that the caller means for contract `name`."""
    if isinstance(given, Mapping):
        if name not in given:
            raise ValueError(f"candidate has nothing for {name!r}; its keys are {', '.join(map(str, given))}")
        given = given[name]
    if given is None:
        return _built_in(name, told)
    if not isinstance(given, str) and not callable(given):
        raise ValueError(
            f"candidate is of type {type(given).__name__}, which can't be called; give a function that takes the"
            f' arguments of {name}, or its place as "FILE.py:NAME"'
        )
    place = _place(given)
    told.at(f"importing {place}")
    function = load(given) if isinstance(given, str) else given
    framework = "numpy" if told.framework is None else told.framework
    _select(framework, told.device)
    return Candidate(
        function=function,
        framework=framework,
        name=place,
        claims=lambda dtype: told.claims,
        dtypes=told.dtypes,
        layouts=told.layouts,
        device=told.device if framework == "torch" else None,
        at=told.case,
    )


def _place(given: Any) -> str:
    """Where a candidate is: as it was told, or MODULE:NAME of an object."""
    if isinstance(given, str | Path):
        return str(given)
    return f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', type(given).__name__)}"


def _built_in(name: str, told: _Told) -> Candidate:
    """The engine's own implementation, in MLX, with the arithmetic that it states for the device."""
    from engine.contracts import claims, implementation

    if told.framework not in (None, "mlx"):
        raise ValueError(f"the engine's own {name} is in mlx; --framework is for a --candidate")
    device = _select("mlx", told.device)
    return Candidate(
        function=_shipped_decoder(device.name) if name == "decoder" else implementation(name),
        framework="mlx",
        name=BUILT_IN,
        claims=lambda dtype: {**claims(name, device, dtype), **told.claims},
        dtypes=told.dtypes,
        layouts=told.layouts,
    )


def _shipped_decoder(device: str) -> Any:
    """The engine with the shipped model, in float32."""
    from audits.cases import SHIPPED_FOLDER
    from engine.decoding import Decoding
    from engine.generate import load as load_engine

    return Decoding(load_engine(SHIPPED_FOLDER, dtype="float32", device=device))


def _select(framework: str, device: str | None) -> Any:
    """Make `device` the one that MLX computes on; for the others it goes with the arrays. ValueError if torch has none
    of that name.
    """
    if framework == "numpy" and device is not None:
        raise ValueError(
            f"device {device!r} is for candidates in mlx or torch; NumPy's arrays are on the CPU: leave it out, or name"
            " the framework"
        )
    if framework == "torch" and device is not None:
        import torch

        try:
            torch.empty(0, device=device)
        except Exception as error:  # whatever the backend raises
            raise ValueError(f"torch can't use the device {device!r}: {one_line(error).partition('. ')[0]}") from error
    if framework != "mlx":
        return None
    from engine.device import select

    return select("auto" if device is None else device)


def _check_claims(claims: Mapping[str, str] | None) -> None:
    """ArithmeticClaimError (a ValueError) for a claim that there isn't."""
    if not isinstance(claims, Mapping | None) or not all(isinstance(x, str) for x in (claims or {}).values()):
        raise ValueError(f'claims are names of dtypes by name, such as {{"accumulate": "float32"}}; not {claims!r}')
    Arithmetic.claim("float32", **dict(claims or {}))


def _listed(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several; ValueError for what is neither."""
    if not isinstance(given, Sequence):
        raise ValueError(f"{what} are of type {type(given).__name__}; a name or a list of names is expected")
    return (given,) if isinstance(given, str) else tuple(given)


def _chosen(what: str, given: str | Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    chosen = _listed(f"{what}s", given)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no {what} {unknown[0]!r}; there is {', '.join(known)}")
    return chosen


@told_apart()
def replay(
    case: Mapping[str, Any], candidate: Any = None, *, device: str | None = None, at: Advance = lambda _: None
) -> Report:
    """Run one case again, as a Verdict recorded it; `candidate` for one that can't be found by its recorded name."""
    case = case.get("case", case) if isinstance(case, Mapping) else {}
    name = case.get("contract") if isinstance(case, Mapping) else None
    if not isinstance(name, str) or name not in names():
        raise ValueError(f'a case to replay has a "contract" ({", ".join(names())}); this one has {name!r}')
    _check_claims(case.get("claims"))
    if name == moe_matmul.NAME and "kernel" in case:
        if device is not None:
            raise ValueError(
                f"this is a case of a Metal kernel, which runs on the host CPU: leave out device {device!r}"
            )
        return Report(verdicts=[moe_matmul.replay(case if candidate is None else {**case, "candidate": candidate})])
    place = case.get("candidate", BUILT_IN)
    if candidate is None and place != BUILT_IN and not (isinstance(place, str) and ".py:" in place):
        raise ValueError(f"{place} was a function of another program: pass it again as candidate")
    told = _Told(
        framework=None if place == BUILT_IN and candidate is None else case.get("framework"),
        device=device,
        claims=case.get("claims"),
        at=at,
    )
    made = _candidate(name, candidate if candidate is not None else None if place == BUILT_IN else place, told)
    return Report(verdicts=[contract(name).replay(case, made)])


def mutants(root: Path, advance: Advance = lambda _: None) -> Iterable[Any]:
    """Every planted bug below `root` (tests/mutants) and which checks caught it."""
    from audits import mutants as kernels
    from audits import planted

    if not root.is_dir():
        raise ValueError(f"{root}: no planted bugs; they are in the repository's tests/mutants, not in the package")
    yield from planted.catch_all(root, advance)
    yield from kernels.catch_all(root / moe_matmul.NAME, moe_matmul.OWN, advance)
