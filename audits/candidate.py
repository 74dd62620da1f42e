"""A candidate: somebody's implementation of a contract, called with arrays of its own framework.

What it raises is a finding, not an error of ours. Optional arguments that it doesn't take are found out by its
signature.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from audits.contract import Argument, Call
from audits.errors import DeviceLost
from audits.frameworks import FRAMEWORKS, LAYOUTS, foul_memory, give, take
from audits.interrupts import by_user

Array = np.ndarray[Any, np.dtype[Any]]


class CandidateError(Exception):
    """The candidate raised; the message says what, its cause is the original."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A callable and what is known of it.

    name: how it can be found again (FILE.py:NAME, or "built-in"). claims: for an input dtype, what it states beyond the
    contract's default arithmetic. dtypes: the ones to try (none: all). layouts: how operands may lie in
    memory. device: of the arrays that a torch candidate is given. at: is told each case before it runs.
    """

    function: Callable[..., Any]
    framework: str
    name: str
    claims: Callable[[str], Mapping[str, str]] = lambda dtype: {}
    dtypes: Sequence[str] = ()
    layouts: Sequence[str] = LAYOUTS
    device: str | None = None
    at: Callable[[Mapping[str, Any]], None] = lambda case: None

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise ValueError(f"no framework {self.framework!r}; there is {', '.join(FRAMEWORKS)}")
        if unknown := [name for name in self.layouts if name not in LAYOUTS]:
            raise ValueError(f"no layout {unknown[0]!r}; there is {', '.join(LAYOUTS)}")
        if not callable(self.function):
            raise ValueError(f"{self.name} is of type {type(self.function).__name__}, which can't be called")

    def lacks(self, arguments: tuple[Argument, ...]) -> tuple[str, ...]:
        """The optional arguments that it doesn't take; ValueError if it lacks one that it must have."""
        try:
            taken = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return ()  # a builtin tells nothing: it is given everything
        if any(p.kind is p.VAR_KEYWORD for p in taken):
            return ()
        names = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken)
        by_place = [a for a in arguments if a.positional]
        if places < len(by_place) and not any(p.kind is p.VAR_POSITIONAL for p in taken):
            raise ValueError(
                f"{self.name} takes {places} argument{'s' * (places != 1)} by position; the contract passes"
                f" {', '.join(a.name for a in by_place)}"
            )
        missing = [a for a in arguments if not a.positional and a.name not in names]
        if needed := [a.name for a in missing if not a.optional]:
            raise ValueError(f"{self.name} takes no argument {needed[0]!r}, which the contract passes by name")
        return tuple(a.name for a in missing)

    def __call__(
        self, call: Call, arguments: tuple[Argument, ...], layouts: Mapping[str, str] | None = None
    ) -> tuple[Array, ...]:
        """Its outputs for `call` in NumPy; CandidateError if it raises, or changes one of its inputs.

        `layouts` says how single operands lie in memory (contiguous unless named).
        """
        layouts = layouts or {}
        try:
            given = {name: self._given(value, layouts.get(name, "contiguous")) for name, value in call.args.items()}
            foul_memory([x.nbytes for x in _arrays(call.args.values())], self.framework)
        except RuntimeError as error:  # none of the candidate's code has run yet in this call
            raise DeviceLost(f"the device is lost: {one_line(error)[:200]}") from error
        by_place = [given[a.name] for a in arguments if a.positional]
        by_name = {a.name: given[a.name] for a in arguments if not a.positional and a.name in given}
        outputs: tuple[Array, ...] = guarded(lambda: _outputs(self.function(*by_place, **by_name)))
        for name, value in call.args.items():
            if isinstance(value, list) and value != given[name]:
                raise ChangedInput(f"changes its input {name}")
            for before, after in zip(_arrays([value]), _arrays([given[name]]), strict=True):
                if before.tobytes() != take(after).tobytes():
                    raise ChangedInput(f"changes its input {name}")
        return outputs

    def _given(self, value: Any, layout: str) -> Any:
        if isinstance(value, tuple):
            return tuple(self._given(part, layout) for part in value)
        if isinstance(value, list):
            return list(value)
        return give(value, self.framework, layout, self.device) if isinstance(value, np.ndarray) else value


class ChangedInput(CandidateError):
    """The candidate wrote into one of its inputs."""


def guarded(work: Callable[[], Any]) -> Any:
    """The result of `work`, candidate code; CandidateError for whatever it raises, KeyboardInterrupt for the user's."""
    try:
        with np.errstate(all="ignore"):
            result = work()
    except BaseException as error:  # SystemExit too: a candidate's sys.exit(0) would end the audit as if it had passed
        if by_user(error):
            raise KeyboardInterrupt from error
        said = one_line(error)[:300]
        raise CandidateError(f"raised {type(error).__name__}{': ' if said else ''}{said}") from error
    if by_user(None):  # it was interrupted, and went on
        raise KeyboardInterrupt
    return result


def one_line(error: BaseException) -> str:
    """An error's message in one line that a terminal, XML and UTF-8 can show."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # somebody's own __str__
        text = "a message that can't be read"
    return "".join(c if c.isprintable() else "?" for c in text)


def _outputs(result: Any) -> tuple[Array, ...]:
    return tuple(take(part) for part in (result if isinstance(result, tuple | list) else (result,)))


def _arrays(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            found += _arrays(value)
        elif hasattr(value, "dtype") and hasattr(value, "shape"):
            found.append(value)
    return found


def load(place: str) -> Callable[..., Any]:
    """The object that FILE.py:NAME names; ValueError if there is none."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not name or path.suffix != ".py":
        raise ValueError(f"--candidate {place!r}: FILE.py:NAME is expected")
    if not path.is_file():
        raise ValueError(f"--candidate {place}: there is no file {file}")
    try:
        module = _import(path)
    except OSError as error:
        raise ValueError(f"--candidate {place}: {file} can't be read ({error.strerror or error})") from error
    if not hasattr(module, name):
        raise ValueError(f"--candidate {place}: {file} defines no {name!r} ({_defined(module, name)})")
    return getattr(module, name)  # type: ignore[no-any-return]


def _defined(module: Any, name: str) -> str:
    """The functions and classes that a module itself defines, those that are called nearly `name` first."""
    own = [n for n, x in vars(module).items() if callable(x) and getattr(x, "__module__", None) == module.__name__]
    close = difflib.get_close_matches(name, own, 8)
    shown = list(dict.fromkeys([*close, *(n for n in own if not n.startswith("_"))]))
    return f"it has {', '.join(shown[:8])}{', …' * (len(shown) > 8)}" if shown else "it has no function and no class"


def _import(path: Path) -> Any:
    # By its text: a candidate that has been mended since is another module.
    key = f"_assay_candidate_{path.stem}_{sha256(bytes(path.resolve()) + path.read_bytes()).hexdigest()[:16]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # a candidate may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(key, None)
        if by_user(error):
            raise KeyboardInterrupt from error
        raise ValueError(f"{path} can't be imported: {type(error).__name__}: {one_line(error)}") from error
    finally:
        with suppress(ValueError):  # its own to change
            sys.path.remove(folder)
    return module
