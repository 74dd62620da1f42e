"""What `engine.metal` raises: one clear line that names the thing and the way out."""

from __future__ import annotations


class MetalError(ValueError):
    """A kernel, a launch or the compiler can't be used as asked."""


class CompileError(MetalError):
    """The source isn't Metal that the host executor supports; `file` and `line` are the user's own."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.file, self.line = file, line
        place = f"{file}:{line}: " if file is not None and line is not None else ""
        super().__init__(place + message)
