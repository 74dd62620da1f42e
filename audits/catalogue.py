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
from audits.frameworks import DTYPES, LAYOUTS
from audits.interrupts import told_apart
from audits.verdict import Report, Verdict
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
    wanted: str | Sequence[str],
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
) -> Report:
    """Judge a candidate (None: the engine's own) by the named contracts (none: all); ValueError for bad input."""
    if not wanted and candidate is not None:
        raise ValueError("name the contract that the candidate is judged by")
    chosen = [contract(name) for name in ([wanted] if isinstance(wanted, str) else list(wanted) or names())]
    for name in candidate if isinstance(candidate, Mapping) else ():
        contract(name)
    _check_claims(claims)
    told = _Told(
        framework=framework,
        device=device,
        claims=claims,
        dtypes=_chosen("dtype", dtypes, DTYPES),
        layouts=_chosen("layout", layouts, LAYOUTS),
    )
    verdicts: list[Verdict] = []
    judging = [list(_judges(one, candidate, told)) for one in chosen]  # bad input shows before anything runs
    for i, judges in enumerate(judging):
        for judge in judges:
            verdicts += judge(full, seed, lambda text, i=i: advance(f"{i + 1}/{len(chosen)} {text}"))  # type: ignore[misc]  # mypy can't infer a lambda's default
    return Report(verdicts=verdicts)


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
    ) -> None:
        self.framework, self.device, self.claims = framework, device, dict(claims or {})
        self.dtypes, self.layouts = dtypes, ("contiguous", *layouts) if layouts else LAYOUTS


Judging = Callable[[bool, int, Advance], Iterable[Verdict]]


def _judges(one: Auditable, candidate: Any, told: _Told) -> Iterator[Judging]:
    """What has to run: the sweep of a Python candidate, and for Metal kernels of routed matmuls the wide-tile audit."""
    kernels = isinstance(candidate, str | Path) and Path(candidate).suffix == ".toml"
    if one.name == moe_matmul.NAME and (kernels or candidate is None):
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
    place = given if isinstance(given, str) else f"{getattr(given, '__module__', '')}:{_name(given)}"
    function = load(given) if isinstance(given, str) else given
    _select(told.framework or "numpy", told.device)
    return Candidate(
        function=function,
        framework=told.framework or "numpy",
        name=place,
        claims=lambda dtype: told.claims,
        dtypes=told.dtypes,
        layouts=told.layouts,
        device=told.device if told.framework == "torch" else None,
    )


def _name(given: Any) -> str:
    return str(getattr(given, "__qualname__", type(given).__name__))


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
    if framework == "torch" and device is not None:
        import torch

        try:
            torch.empty(0, device=device)
        except Exception as error:  # whatever the backend raises
            raise ValueError(f"torch can't use the device {device!r}: {one_line(error).partition('. ')[0]}") from error
    if framework != "mlx":
        return None
    from engine.device import select

    return select(device or "auto")


def _check_claims(claims: Mapping[str, str] | None) -> None:
    """ArithmeticClaimError (a ValueError) for a claim that there isn't."""
    if not isinstance(claims, Mapping | None) or not all(isinstance(x, str) for x in (claims or {}).values()):
        raise ValueError(f'claims are names of dtypes by name, such as {{"accumulate": "float32"}}; not {claims!r}')
    Arithmetic.claim("float32", **dict(claims or {}))


def _chosen(what: str, given: str | Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    chosen = (given,) if isinstance(given, str) else tuple(given)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no {what} {unknown[0]!r}; there is {', '.join(known)}")
    return chosen


@told_apart()
def replay(case: Mapping[str, Any], candidate: Any = None, *, device: str | None = None) -> Report:
    """Run one case again, as a Verdict recorded it; `candidate` for one that can't be found by its recorded name."""
    case = case.get("case", case) if isinstance(case, Mapping) else {}
    name = case.get("contract") if isinstance(case, Mapping) else None
    if not isinstance(name, str) or name not in names():
        raise ValueError(f'a case to replay has a "contract" ({", ".join(names())}); this one has {name!r}')
    _check_claims(case.get("claims"))
    if name == moe_matmul.NAME and "kernel" in case:
        return Report(verdicts=[moe_matmul.replay(case)])
    place = case.get("candidate", BUILT_IN)
    if candidate is None and place != BUILT_IN and not (isinstance(place, str) and ".py:" in place):
        raise ValueError(f"{place} was a function of another program: pass it again as candidate")
    told = _Told(
        framework=None if place == BUILT_IN and candidate is None else case.get("framework"),
        device=device,
        claims=case.get("claims"),
        dtypes=(),
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
