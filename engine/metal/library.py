"""Compile Metal source for the host CPU and launch its kernels there: what `assay.metal` offers.

A launch describes a dispatch as Metal does (threadgroups or threads of the grid, threads of a threadgroup, buffers by
index) and runs in a worker process, so that a kernel that crashes, hangs or writes where it shouldn't ends there.
Results are the host's: rounding under fast-math and the accumulation order inside Apple's matrix units are not Apple's,
so a Run always names its device.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.metal import compiler, parameters, source
from engine.metal.constants import values_of
from engine.metal.errors import CompileError, MetalError
from engine.metal.launch import MOST_THREADS, Compiled, Launch, Options, Run, Size, schedule, shape
from engine.metal.parameters import Parameter
from engine.metal.rewrite import rewrite
from engine.metal.worker import Worker

__all__ = ["Kernel", "Library", "Run", "compile"]


class Kernel:
    """One kernel of a library, ready to launch. `parameters`: name, index, kind, address space, type text of each."""

    def __init__(self, library: Library, compiled: Compiled) -> None:
        self._library = library
        self._compiled = compiled

    @property
    def name(self) -> str:
        return self._compiled.name

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self._compiled.parameters

    def __repr__(self) -> str:
        return f"<Kernel {self.name}, {len(self.parameters)} parameters>"

    def launch(
        self,
        buffers: Mapping[int, object],
        *,
        threads: Size,
        threadgroups: Size | None = None,
        grid: Size | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        outputs: Sequence[int] = (),
        schedule_seed: int | None = None,
        timeout: float = 10.0,
        poison: bool = True,
    ) -> Run:
        """Run the kernel over `threadgroups` (x, y, z), or over a `grid` of threads, `threads` to a threadgroup.

        `buffers`: index → bytes or scalar (inputs) or array (written in place where the kernel may write; its dtype is
        the kernel's, or uint8); None for a buffer that has no bytes. `threadgroup_memory`: bytes of each
        [[threadgroup(n)]]. `outputs` names buffers whose contents mean nothing before the launch: they are filled with
        NaN patterns and count as uninitialised in checked mode.
        Threadgroup memory starts as NaNs too, or as zeros without `poison`. `schedule_seed`, 0 to 2**64 - 1, permutes
        the order of lanes, simdgroups and threadgroups on one host thread, the same seed giving the same run; without
        one, threadgroups of an unchecked kernel run side by side. After a crash or `timeout` seconds (both are faults)
        arrays are left as they were. Raises MetalError for a launch that Metal could not issue.
        """
        began = time.perf_counter()
        dispatch = shape(threads, threadgroups, grid, self._compiled.most_threads)
        options = Options(
            memory=dict(threadgroup_memory or {}),
            outputs=tuple(outputs),
            seed=schedule(schedule_seed),
            timeout=timeout,
            poison=poison,
        )
        with self._library._lock:
            return Launch(self._compiled, self._library._worker(), dispatch, options).run(buffers, began)


class Library:
    """A Metal source and its kernels; each is compiled when it is first asked for."""

    def __init__(self, scanned: source.Source, constants: Mapping[int | str, object], *, checked: bool) -> None:
        self.checked = checked
        self._source = scanned
        self._values = values_of(scanned, constants)
        self._ready: dict[str, Kernel] = {}
        self._running: Worker | None = None
        self._lock = threading.RLock()

    @property
    def kernels(self) -> list[str]:
        """Host names of all kernels in the source, compiled or not."""
        return list(self._source.kernels)

    def __getitem__(self, name: str) -> Kernel:
        """The kernel of that host name. Raises CompileError, or MetalError when there is none."""
        return self.build([name])[0]

    def build(self, names: Sequence[str]) -> list[Kernel]:
        """Compile several kernels in one go, which is quicker than one by one."""
        with self._lock:
            wanted = [name for name in dict.fromkeys(names) if name not in self._ready]
            for name in wanted:
                if name not in self._source.kernels:
                    close = difflib.get_close_matches(str(name), self._source.kernels, 3) or self.kernels[:8]
                    raise MetalError(f"no kernel is named {name!r}; there are {', '.join(close) or 'none'}")
        if wanted:  # not under the lock: threads that build other kernels of this library go on meanwhile
            self._compile([self._source.kernels[name] for name in wanted])
        return [self._ready[name] for name in names]

    def _compile(self, declarations: Sequence[source.KernelDeclaration]) -> None:
        with self._lock:
            rewritten = rewrite(self._source, declarations, self._values)
        module = compiler.module(rewritten.text, checked=self.checked)
        for declared in declarations:
            found = parameters.parameters(self._source, declared)
            compiled = Compiled(
                name=declared.host_name,
                parameters=found,
                optional=parameters.optional(self._source, declared, found, self._values),
                most_threads=parameters.most_threads(self._source, declared) or MOST_THREADS,
                module=module,
                variables=rewritten.variables,
                checked=self.checked,
            )
            self._ready[declared.host_name] = Kernel(self, compiled)

    def _worker(self) -> Worker:
        if self._running is None:
            self._running = Worker(compiler.worker(checked=self.checked))
        return self._running

    def close(self) -> None:
        """End the worker process now; a later launch starts another."""
        with self._lock:
            if self._running is not None:
                self._running.stop()


def _is_path(text: str) -> bool:
    return "\n" not in text and "{" not in text and (text.endswith(".metal") or Path(text).is_file())


def compile(
    source_or_path: str | Path,
    device: str = "host",
    checked: bool = False,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    constants: Mapping[int | str, object] | None = None,
) -> Library:
    """A Library of the kernels in Metal source text, or in a file.

    `include_dirs` and `defines` as for the Metal compiler; `constants` gives function constants their values, by index
    or by name. `checked` compiles with every load and store watched. Raises CompileError at the user's line, or for a
    source without any kernel, and MetalError for anything else that can't be had here.
    """
    _check_types(source_or_path, include_dirs, defines, constants)
    if device not in ("host", "gpu"):
        raise MetalError(f"device {device!r} is unknown; pass 'host' (this machine's CPU) or 'gpu' (an Apple GPU)")
    if device == "gpu":
        from engine.metal import gpu  # it extends this module

        gpu.require(checked=checked)
    folders = [Path(folder).resolve() for folder in include_dirs]
    path = Path(source_or_path) if isinstance(source_or_path, Path) or _is_path(source_or_path) else None
    if path is not None:
        if not path.is_file():
            raise MetalError(f"there is no Metal source {path}")
        text = compiler.preprocess(path.resolve(), str(path), folders, defines or {})
    else:
        text = compiler.preprocess_text(str(source_or_path), folders, defines or {})
    scanned = source.read(text)
    if not scanned.kernels:
        raise CompileError(f"{path or 'the source'} has no kernel: {_why_none(scanned)}")
    if device == "gpu":
        return gpu.compile(text, constants or {})
    return Library(scanned, constants or {}, checked=checked)


def _why_none(scanned: source.Source) -> str:
    """What is missing in a source without kernels."""
    templates = [f.name for f in scanned.scanner.found.functions if source.is_kernel(scanned, f)]
    if templates:
        name = templates[0]
        return (
            f'the template {name} is never instantiated, as `template [[host_name("{name}_float")]] [[kernel]]'
            f" decltype({name}<float>) {name}<float>;` would do for float"
        )
    return "no function in it is marked `kernel`, as far as its #if let the compiler see"


def _check_types(source_or_path: object, include_dirs: object, defines: object, constants: object) -> None:
    """MetalError for what is no source, no list of folders or no dict."""
    if not isinstance(source_or_path, str | Path):
        raise MetalError(
            f"Metal source is a str, or the path of a file; this is of type {type(source_or_path).__name__}"
        )
    if isinstance(include_dirs, str) or not isinstance(include_dirs, Sequence):
        raise MetalError(f"include_dirs is a list of folders; this is of type {type(include_dirs).__name__}")
    if missing := [str(folder) for folder in include_dirs if not Path(folder).is_dir()]:
        raise MetalError(f"there is no folder {missing[0]!r} to include from")
    if isinstance(defines, Mapping) and not all(str(name).strip() for name in defines):
        raise MetalError("a macro without a name is defined; NAME or NAME=VALUE is expected")
    for name, given in (("defines", defines), ("constants", constants)):
        if not isinstance(given, Mapping | None):
            raise MetalError(f"{name} is a dict from names to values; this is of type {type(given).__name__}")
