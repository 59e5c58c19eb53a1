"""Checks what needs no run, and finds where statements begin.

libclang parses the rewritten text and so gives the front end's own errors: address spaces that
don't fit, types that Metal hasn't, names that don't exist. Then come rules of Metal that OpenCL
hasn't, looked up in the syntax tree. The same walk collects the statements, for `statements.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from . import headers, statements
from .errors import Message, SimulatorError, StaticFault
from .rewrite import Rewritten
from .text import KernelText
from .toolchain import cached, digest, libclang

WARNINGS = [
    *("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized"),
    *("-Wimplicit-float-conversion", "-Warray-bounds"),
]
_SPACES = {"device", "constant", "threadgroup", "thread", "auto"}
_OPENCL_SPACES = ("__global", "__constant", "__local", "__private")
_FIRST_LINE = '#line 1 "kernel"\n'


@dataclass(frozen=True)
class Checked:
    """The text with a call at the beginning of each statement, and the lines of these."""

    text: str
    statement_lines: tuple[int, ...]


def check(kernel: KernelText, rewritten: Rewritten, launcher: str) -> Checked:
    """Raises a StaticFault that lists all that is wrong with the kernel.

    ``launcher`` calls it: much of what can be wrong with a template shows only when it is used.
    """
    key = digest(
        str(headers.folder()), json.dumps(kernel.own), kernel.text, rewritten.text, launcher
    )
    found = json.loads(
        cached(f"{key}.json", lambda path: _write(path, kernel, rewritten, launcher)).read_text()
    )
    if found["faults"]:
        places = [(kernel.place(line), text) for line, text in found["faults"]]
        raise StaticFault([Message(place.file, place.line, text) for place, text in places])
    return Checked(found["text"], tuple(found["statements"]))


def _write(path: Path, kernel: KernelText, rewritten: Rewritten, launcher: str) -> None:
    if rewritten.faults:
        found = {"faults": rewritten.faults, "text": "", "statements": []}
    else:
        found = _Walk(kernel, rewritten.text, launcher).result()
    path.write_text(json.dumps(found))


class _Walk:
    """One walk over the syntax tree of a kernel."""

    def __init__(self, kernel: KernelText, text: str, launcher: str):
        self.cindex = libclang()
        self.kinds = self.cindex.CursorKind
        kinds = self.kinds
        self.functions = {kinds.FUNCTION_DECL, kinds.FUNCTION_TEMPLATE, kinds.CXX_METHOD}
        self.functions |= {kinds.CONSTRUCTOR, kinds.CONVERSION_FUNCTION}
        self.kernel = kernel
        self.text = text
        self.faults: list[tuple[int, str]] = []
        self.calls: dict[str, set[str]] = {}
        source = _FIRST_LINE + text + launcher
        self.path = str(cached(f"{digest(source)}.cl", lambda path: path.write_text(source)))
        self.unit = self._parse()
        self.statements = statements.Statements(self.cindex, text, len(_FIRST_LINE))

    def _parse(self):
        flags = [*headers.LANGUAGE, *headers.includes(), *WARNINGS]
        flags += headers.checked_with(WARNINGS)
        try:
            # Without the declarations of the headers: they are most of the tree.
            return self.cindex.Index.create(excludeDecls=True).parse(self.path, args=flags)
        except self.cindex.TranslationUnitLoadError as error:
            raise SimulatorError(f"libclang couldn't read {self.kernel.file}: {error}") from error

    def result(self) -> dict:
        self._read_diagnostics()
        if not self.faults:
            for cursor in self.unit.cursor.get_children():
                self._program_scope(cursor)
            self._visit(self.unit.cursor, None)
            self._find_recursion()
        marked = self.statements.marked(self.kernel.own)
        faults = list(dict.fromkeys(self.faults))
        return {"faults": faults, "text": marked.text, "statements": marked.lines}

    def _line(self, location) -> int:
        return location.line - 1

    def _is_own(self, location) -> bool:
        """In the kernel's text, not in a header or in the launcher behind it."""
        in_file = location.file is not None and location.file.name == self.path
        return in_file and 0 < self._line(location) <= len(self.kernel.lines)

    def _fault(self, location, text: str) -> None:
        self.faults.append((self._line(location), text))

    # ---- What the front end says ------------------------------------------------------------

    def _read_diagnostics(self) -> None:
        for diagnostic in self.unit.diagnostics:
            text, option = diagnostic.spelling, diagnostic.option or ""
            if diagnostic.severity >= diagnostic.Error:
                self._error(diagnostic)
            elif not self._is_own(diagnostic.location) or diagnostic.severity < diagnostic.Warning:
                continue
            elif "float-conversion" in option:
                # Metal converts to half on its own, but not to bfloat.
                if re.search(r"to '(__private )?(bfloat\w*|__bf16)'", text):
                    self._fault(
                        diagnostic.location,
                        f"Metal has no implicit conversion {text.split(': ', 1)[-1]}",
                    )
            else:
                self._fault(diagnostic.location, text)

    def _error(self, diagnostic) -> None:
        notes = [note for note in diagnostic.children if self._is_own(note.location)]
        text = diagnostic.spelling + "".join(
            f"\n    {self.kernel.place(self._line(note.location))}: {note.spelling}"
            for note in notes
        )
        if self._is_own(diagnostic.location):
            self._fault(diagnostic.location, text)
        else:
            # In a template of MLX's or the stand-in's: the kernel's line is in a note, if anywhere.
            line = self._line(notes[0].location) if notes else 0
            self.faults.append((line, f"{text} ({diagnostic.location.file})"))

    # ---- Rules of Metal ---------------------------------------------------------------------

    def _visit(self, parent, function) -> None:
        for cursor in parent.get_children():
            if not self._is_own(cursor.location):
                continue
            inside = function
            if cursor.kind in self.functions:
                inside = cursor
            self._address_space(cursor)
            self._forbidden(cursor)
            if cursor.kind == self.kinds.CALL_EXPR and inside is not None and cursor.referenced:
                self.calls.setdefault(inside.get_usr(), set()).add(cursor.referenced.get_usr())
            self.statements.visit(cursor, inside)
            self._visit(cursor, inside)

    def _program_scope(self, cursor) -> None:
        if cursor.kind != self.kinds.VAR_DECL or not self._is_own(cursor.location):
            return
        if "__constant" not in cursor.type.spelling:
            text = (
                f"program-scope variable '{cursor.spelling}' must be in the constant address space"
            )
            self._fault(cursor.location, text)

    def _forbidden(self, cursor) -> None:
        if cursor.kind in (self.kinds.GOTO_STMT, self.kinds.INDIRECT_GOTO_STMT):
            self._fault(cursor.location, "Metal has no goto")
        elif cursor.kind == self.kinds.LAMBDA_EXPR:
            self._fault(cursor.location, "lambda expressions need Metal 4")

    def _address_space(self, cursor) -> None:
        """Metal up to 4.0 wants it written out; later ones take a pointer without as generic."""
        kinds = self.kinds
        returns = cursor.kind in (kinds.FUNCTION_DECL, kinds.CXX_METHOD)
        aliases = (kinds.TYPEDEF_DECL, kinds.TYPE_ALIAS_DECL)
        typed = (kinds.VAR_DECL, kinds.PARM_DECL, kinds.FIELD_DECL, *aliases)
        casts = (
            kinds.CSTYLE_CAST_EXPR,
            kinds.CXX_STATIC_CAST_EXPR,
            kinds.CXX_REINTERPRET_CAST_EXPR,
        )
        if not returns and cursor.kind not in typed + casts:
            return
        kind = cursor.result_type if returns else cursor.type
        if cursor.kind in aliases:
            kind = cursor.underlying_typedef_type
        reference = kind.kind == self.cindex.TypeKind.LVALUEREFERENCE
        if not reference and kind.kind != self.cindex.TypeKind.POINTER:
            return
        target = kind.get_pointee().spelling
        if any(space in target for space in _OPENCL_SPACES):
            return
        words = _declaration(cursor, returns)
        if not words and "__generic" not in target:
            return
        if not _SPACES & set(words) and not any("__sim_" in word for word in words):
            what = "reference" if reference else "pointer"
            text = (
                f"{what} type must have explicit address space qualifier: '{' '.join(words)[:80]}'"
            )
            self._fault(cursor.location, text)

    def _find_recursion(self) -> None:
        for function in self.calls:
            reached, todo = set(), [function]
            while todo:
                for called in self.calls.get(todo.pop(), ()):
                    if called not in reached:
                        reached.add(called)
                        todo.append(called)
            if function in reached:
                self.faults.append((self._line_of(function), "Metal has no recursion"))

    def _line_of(self, usr: str) -> int:
        todo = list(self.unit.cursor.get_children())
        while todo:
            cursor = todo.pop()
            if cursor.get_usr() == usr:
                return self._line(cursor.location)
            todo.extend(cursor.get_children())
        return 0


def _declaration(cursor, returns: bool) -> list[str]:
    """The words of a declaration or a cast up to what it is initialised with."""
    words = []
    for token in cursor.get_tokens():
        if token.spelling in ("=", "{", ";") or (returns and token.spelling == "("):
            break
        words.append(token.spelling)
    return words
