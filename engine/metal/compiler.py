"""The C++ compiler and the cache of what it made.

The default is PyPI's `ziglang` (clang as `python -m ziglang c++`): a pinned dependency, so that the same source gives
the same kernel everywhere. ASSAY_CXX names another clang. Results are kept by the hash of everything they depend on:
text, flags, compiler, processor, shim and runtime. ASSAY_CACHE names another folder for them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from engine.metal.errors import CompileError, MetalError

HOST = Path(__file__).parent / "host"
_RUNTIME = (
    "address_space.cpp", "division.cpp", "guard_gaps.cpp", "host_threads.cpp", "runtime.cpp", "scheduler.cpp",
    "signals.cpp", "threadgroup_memory.cpp", "worker.cpp",
)  # fmt: skip
_CHECKERS = "check*.cpp"
# What a source may include of Metal's own. While preprocessing they are empty, so that only the user's text is
# rewritten.
_METAL_HEADERS = (
    "metal_array", "metal_assert", "metal_atomic", "metal_command_buffer", "metal_common", "metal_compute",
    "metal_config", "metal_extended_vector", "metal_geometric", "metal_graphics", "metal_imageblocks",
    "metal_initializer_list", "metal_integer", "metal_interpolate", "metal_limits", "metal_logging", "metal_math",
    "metal_matrix", "metal_mesh", "metal_numeric", "metal_pack", "metal_quadgroup", "metal_raytracing",
    "metal_relational", "metal_simdgroup", "metal_simdgroup_matrix", "metal_stdlib", "metal_tensor",
    "metal_tessellation", "metal_texture", "metal_type_traits", "metal_types", "metal_uniform", "metal_utility",
    "metal_visible_function_table",
)  # fmt: skip
# __METAL_VERSION__ 320: Metal 3.2, the first version with every feature that the shim has. Sources that find no
# __METAL_MEMORY_SCOPE_SYSTEM__ define thread_scope_system themselves, from 3.
_PREDEFINED = (
    "-D__METAL__=1", "-D__METAL_VERSION__=320", "-D__HAVE_BFLOAT__=1", "-D__METAL_MACOS__=1",
    "-D__METAL_MEMORY_SCOPE_SYSTEM__=3",
)  # fmt: skip
# Metal's char is signed; that of Linux on ARM is not.
_COMMON = (
    "-std=gnu++20", "-O2", "-w", "-fno-sanitize=undefined", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing",
    "-fsigned-char", "-fwrapv", "-fno-finite-loops", "-fno-delete-null-pointer-checks",
    "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer", "-fno-stack-protector", "-gline-tables-only",
    "-fdebug-compilation-dir=.",
)  # fmt: skip
# Metal's half and float round after every operation, so nothing may be contracted or kept wider.
_ARITHMETIC = ("-ffp-contract=off", "-fno-fast-math", "-fno-math-errno")
# The loop vectoriser makes gathers of small register tiles, which then stay in memory (a tiled matmul with 4x16 outputs
# a thread: 0.64 ns a multiply-add with it, 0.07 without). Straight-line code is still vectorised. The machine scheduler
# carries sums across the switch at a barrier, where nothing keeps their terms in registers (one output a thread: 1.26
# ns with it, 0.97 without, everything else being equal).
_TUNING = ("-fno-vectorize", "-mllvm", "-enable-misched=0")
# Lanes that part go on in the order of their sites' addresses (host/scheduler.cpp): no block may be laid before one
# that leads to it, however likely the way round that one is, and no tail be copied. Checked code is slower for it.
_SITE = re.compile(r"\b(?:simd|quad)_\w+\s*[(<]")
_LAYOUT = ("-mllvm", "-static-likely-prob=100", "-mllvm", "-tail-dup-placement=false")
# A call must not be duplicated into both sides of a branch on the thread's index: its lanes would no longer meet.
# Passes that run before inlining see only the user's and the shim's functions around the runtime's, so all are marked.
_CONVERGENT = ("-fconvergent-functions",)
# ThreadSanitizer's pass tells the checkers of every access of 1 to 16 bytes; wider ones it would leave out. It doesn't
# say what alignment a type needs: the alignment check does. (ziglang's driver drops `alignment` from a joint option.)
_CHECKED = (
    "-fsanitize=thread", "-fsanitize=alignment", "-fsanitize-recover=alignment", "-fno-slp-vectorize",
    "-mllvm", "-tsan-instrument-read-before-write=1", "-mllvm", "-tsan-instrument-func-entry-exit=0",
    # Two accesses merged into one would have no line.
    "-mllvm", "-simplifycfg-sink-common=false", "-mllvm", "-simplifycfg-hoist-common=false",
    "-mllvm", "-enable-tail-merge=false", "-mllvm", "-simplifycfg-merge-cond-stores=false",
    "-mllvm", "-simplifycfg-hoist-cond-stores=false",
)  # fmt: skip
# msl/simdgroup_matrix.h: 3.7 times slower an operation, and only such a source can tell.
_SPREAD = ("-DMSL_SPREAD_MATRICES",)
_DIAGNOSTIC = re.compile(r"^(?P<file>[^\n:]+):(?P<line>\d+):\d+: (?:fatal )?error: (?P<text>.*)$", re.MULTILINE)


def command() -> tuple[str, ...]:
    """The compiler's command line, by what ASSAY_CXX says now. Raises MetalError when there is none."""
    own = os.environ.get("ASSAY_CXX")
    if own is not None and own != "":
        try:
            words = tuple(shlex.split(own))
        except ValueError as error:
            raise MetalError(f"ASSAY_CXX={own!r} is no command line: {error}") from None
        if not words:
            raise MetalError(f"ASSAY_CXX={own!r} names no compiler: unset it, or name a clang++ (16 or later)")
        return words
    if find_spec("ziglang") is None:
        raise MetalError(
            "no compiler for Metal kernels: `pip install ziglang`, or set ASSAY_CXX to a clang++ (16 or later)"
        )
    return (sys.executable, "-m", "ziglang", "c++")


# Apple numbers its clangs after Xcode: its 15 is LLVM's 16.
_OLDEST, _OLDEST_OF_APPLE = 16, 15


@functools.cache
def _version(words: tuple[str, ...]) -> str:
    """What a compiler that ASSAY_CXX names calls itself. Raises MetalError for one that isn't clang 16 or later."""
    asked = ["-E", "-P", "-x", "c++", "-"]
    done = _start([*words, *asked], "answer __clang_major__ __apple_build_version__ __clang_version__")
    answer, *said = [*done.stdout.split(None, 3), ""]
    known = done.returncode == 0 and answer == "answer" and len(said) == 4 and said[0].isdigit()
    if not known or int(said[0]) < (_OLDEST_OF_APPLE if said[1].isdigit() else _OLDEST):
        what = f"clang {said[2].strip().strip(chr(34))}" if known else "no clang"
        raise MetalError(
            f"ASSAY_CXX={shlex.join(words)!r} is {what}: kernels need clang++ 16 or later (Apple's 15); "
            "unset it to use ziglang's"
        )
    return done.stdout + _start([*words, "--version"]).stdout


@functools.cache
def _identity(words: tuple[str, ...], chosen: bool) -> str:
    """Compiler, whether ASSAY_CXX has chosen it, and processor: the default compiler tunes for the one it runs on."""
    own = "\0".join(words) + _version(words) if chosen else ""
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    named = own or "ziglang " + metadata.version("ziglang")
    return "\n".join((named, platform.platform(), platform.machine(), platform.processor(), flags))


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if own := os.environ.get("ASSAY_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    if base is None and sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    return Path(base or Path.home() / ".cache") / "assay" / "metal"


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetalError(
            f"compiled kernels can't be kept in {folder} ({error.strerror}); set ASSAY_CACHE to a folder that can be"
            " written"
        ) from None
    return folder


@functools.cache
def _host_text() -> str:
    """A hash of the runtime and the shim, and of where they are: a module's line table names the shim's files, by which
    faults inside it are told from faults in the user's source.
    """
    digest = hashlib.sha256(str(HOST).encode() + b"\0")
    for path in sorted(p for p in HOST.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(HOST)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(*parts: str) -> str:
    made_by = _identity(command(), bool(os.environ.get("ASSAY_CXX")))
    return hashlib.sha256("\0".join((made_by, _host_text(), *parts)).encode()).hexdigest()[:32]


def _target_flags(checked: bool) -> tuple[str, ...]:
    """Flags that depend on the machine.

    x86 processors without half arithmetic would keep intermediate results in float, and instrumented accesses end at
    16 bytes. Large frames are probed page by page so that none jumps over a fiber's guard page (Darwin has no option).
    """
    flags: list[str] = [] if sys.platform == "darwin" else ["-fstack-clash-protection"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags += ["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"]
        flags += ["-march=native"] if os.environ.get("ASSAY_CXX") else []
        flags += ["-mno-avx"] if checked else []
    return tuple(flags)


def _run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    words = command()
    if os.environ.get("ASSAY_CXX"):
        _version(words)
    return _start([*words, *arguments])


def _start(words: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MetalError(f"the compiler {words[0]} does not start: {error}") from None


def diagnose(output: str, rename: Mapping[str, str] | None = None) -> CompileError:
    """The compiler's first error as a CompileError at the user's line; later ones follow in its message."""
    found = [match.groupdict() for match in _DIAGNOSTIC.finditer(output)]
    if not found:
        return CompileError("the compiler failed without naming a line:\n" + output.strip()[-2000:])
    host = str(HOST)
    first = next((item for item in found if not item["file"].startswith(host)), found[0])
    file, line = first["file"], int(first["line"])
    if file.startswith(host):
        # The error lies in the shim: the user's line is in the chain of instantiations below it.
        chain = re.finditer(r"^([^\n:]+):(\d+):\d+: note: (?:in instantiation|candidate|while)", output, re.MULTILINE)
        user = next((m for m in chain if not m[1].startswith(host) and not m[1].startswith("kernel.")), None)
        file, line = (user[1], int(user[2])) if user else (file, line)
    file = (rename or {}).get(file, file)
    rest = "".join(f"\n  {item['file']}:{item['line']}: {item['text']}" for item in found[:8] if item is not first)
    return CompileError(first["text"] + rest, file=file, line=line)


@functools.cache
def _empty_headers() -> Path:
    folder = cache_folder() / "empty-headers"
    _made(folder / "simd")
    for name in (*_METAL_HEADERS, "simd/simd.h", "simd/vector_types.h", "simd/types.h"):
        if not (folder / name).exists():
            (folder / name).touch()
    return folder


def preprocess(path: Path, shown: str, include_dirs: Sequence[Path], defines: Mapping[str, object]) -> str:
    """The preprocessed text of a Metal file, in which it is called `shown`. Raises CompileError."""
    flags = ["-E", "-x", "c++", "-std=c++17", "-undef", "-nostdinc", *_PREDEFINED, "-isystem", str(_empty_headers())]
    flags += [f"-I{folder}" for folder in include_dirs]
    flags += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in defines.items()]
    done = _run([*flags, str(path)])
    if done.returncode != 0:
        raise diagnose(done.stderr, {str(path): shown})
    return done.stdout.replace(f'"{path}"', f'"{shown}"')


def preprocess_text(text: str, include_dirs: Sequence[Path], defines: Mapping[str, object]) -> str:
    """The preprocessed text of Metal source that has no file; it is called program_source, as Metal itself does."""
    with _scratch() as folder:
        path = Path(folder) / "program_source"
        path.write_text(text)
        return preprocess(path, path.name, include_dirs, defines)


def _link_flags() -> tuple[str, ...]:
    # -O2: without it ziglang adds its own alignment handler to the module, which aborts.
    return ("-shared", "-O2", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared", "-O2")


def _store(made: Path, kept: Path) -> Path:
    """Move a result into the cache in one step: another process may be making the same one."""
    _made(kept.parent)
    made.replace(kept)
    return kept


def _scratch() -> tempfile.TemporaryDirectory[str]:
    _made(cache_folder())
    return tempfile.TemporaryDirectory(dir=cache_folder(), prefix="making-")


def module(text: str, *, checked: bool) -> Path:
    """A loadable module made from rewritten C++ text, from the cache when it is there. Raises CompileError."""
    flags = [
        *_COMMON,
        *_ARITHMETIC,
        *_TUNING,
        *(_LAYOUT if _SITE.search(text) else ()),
        *_CONVERGENT,
        *_target_flags(checked),
        "-fPIC",
        "-fvisibility=hidden",
        *(_CHECKED if checked else ()),
        *(_SPREAD if "thread_elements" in text else ()),
    ]
    kept = cache_folder() / f"{_key('module', text, *flags)}.so"
    if kept.exists():
        return kept
    with _scratch() as folder:
        source, made, linked = (Path(folder) / name for name in ("kernel.cpp", "kernel.o", "kernel.so"))
        source.write_text('#include "runtime.h"\n#include <metal_stdlib>\n' + text)
        flags += [f"-I{HOST}", f"-isystem{HOST / 'include'}"]
        done = _run([*flags, "-c", str(source), "-o", str(made)])
        if done.returncode != 0 and checked:
            # Watched copies of vectors (msl/vec.h) are functions, which takes the copies of a union of them away.
            done = _run([*flags, "-DMSL_PLAIN_COPIES", "-c", str(source), "-o", str(made)])
        if done.returncode == 0:
            if sys.platform == "darwin":  # a module's line tables stay in its object file there (lines.py)
                made = _store(made, kept.with_suffix(".o"))
            done = _run([*_link_flags(), str(made), "-o", str(linked)])
        if done.returncode != 0:
            raise diagnose(done.stderr)
        return _store(linked, kept)


def worker(*, checked: bool) -> Path:
    """The worker's executable, from the cache when it is there."""
    sources = [HOST / name for name in _RUNTIME] + (sorted(HOST.glob(_CHECKERS)) if checked else [])
    # The function that every barrier calls is a leaf: 3% of a matmul with one output a thread.
    flags = [*_COMMON, "-pthread", "-DASSAY_CHECKED" if checked else "-momit-leaf-frame-pointer"]
    flags += [] if sys.platform == "darwin" else ["-rdynamic", "-ldl"]
    kept = cache_folder() / f"worker-{_key('worker', *flags)}"
    if kept.exists():
        return kept
    with _scratch() as folder:
        made = Path(folder) / "worker"
        done = _run([*flags, *map(str, sources), "-o", str(made)])
        if done.returncode != 0:
            raise MetalError("the executor's runtime does not compile here:\n" + done.stderr[-4000:])
        return _store(made, kept)
