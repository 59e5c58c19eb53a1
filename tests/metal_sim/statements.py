"""Finds where the statements of a kernel begin, and puts a call there that counts them.

This is what line coverage stands on. The places come from the syntax tree, so they are the
statements of the text that people wrote, in templates too: no optimisation merges them, no branch
that a template leaves out is forgotten, and two statements on a line are two. The call also tells
the runtime where a thread is, and lets it stop one that hangs. What it can't see is which half of
``a ? b : c`` or ``a && b`` ran.

``constexpr`` functions are left out: the compiler may have run them.

On the way, casts of pointers get a call around them that looks at the alignment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Marked:
    text: str
    lines: list[int]


class Statements:
    """Collects insertions into ``text``; ``start`` is where it begins in what libclang parsed."""

    def __init__(self, cindex, text: str, start: int):
        self.kinds = cindex.CursorKind
        self.text = text
        self.start = start
        self.begins: set[int] = set()
        self.braces: dict[int, int] = {}
        self.casts: dict[int, int] = {}
        self.compile_time: dict[int, bool] = {}
        self.templates: list[tuple[int, int]] = []
        self.pointer, self.void = cindex.TypeKind.POINTER, cindex.TypeKind.VOID
        kinds = self.kinds
        self.controls = {kinds.IF_STMT, kinds.FOR_STMT, kinds.WHILE_STMT, kinds.SWITCH_STMT}
        self.labels = {kinds.CASE_STMT, kinds.DEFAULT_STMT}
        self.silent = {kinds.TYPEDEF_DECL, kinds.TYPE_ALIAS_DECL, kinds.STATIC_ASSERT}
        self.silent |= {kinds.USING_DECLARATION, kinds.USING_DIRECTIVE, kinds.STRUCT_DECL}

    def visit(self, cursor, function) -> None:
        """Looks at one cursor of the tree; ``function`` is the one around it."""
        kinds = self.kinds
        if cursor.kind == kinds.FUNCTION_TEMPLATE:
            extent = cursor.extent
            self.templates.append((self._offset(extent.start), self._offset(extent.end)))
        if function is None or self._is_compile_time(function) or self._is_instance(function):
            return
        if cursor.kind == kinds.COMPOUND_STMT:
            for child in cursor.get_children():
                self._statement(child)
        elif cursor.kind in self.controls:
            head = self._end_of_head(cursor)
            for child in cursor.get_children():
                if self._offset(child.extent.start) >= head:
                    self._body(child)
        elif cursor.kind == kinds.DO_STMT:
            self._body(next(cursor.get_children()))
        elif cursor.kind in (kinds.CSTYLE_CAST_EXPR, kinds.CXX_REINTERPRET_CAST_EXPR):
            self._cast(cursor)

    def _is_instance(self, function) -> bool:
        """An instance of a template; the template itself comes before it, and has all branches."""
        start = self._offset(function.extent.start)
        return any(first < start < last for first, last in self.templates)

    def _cast(self, cursor) -> None:
        start, end = self._offset(cursor.extent.start), self._offset(cursor.extent.end)
        is_pointer = cursor.type.kind == self.pointer
        written_out = self.text.startswith(("(", "reinterpret_cast"), start)  # not by a macro
        if is_pointer and written_out and cursor.type.get_pointee().kind != self.void:
            self.casts[start] = end

    def marked(self, own_lines: list[bool]) -> Marked:
        """The text with a call at each statement of lines that are somebody's own."""
        insertions: list[tuple[int, int, str]] = []
        lines: list[int] = []
        for offset in sorted(self.begins):
            line = self.text.count("\n", 0, offset) + 1
            brace = "{ " if offset in self.braces else ""
            call = ""
            if own_lines[line - 1]:
                lines.append(line)
                call = f"metal::__sim_at({len(lines)}u); "
            insertions.append((offset, 1, brace + call))
            if brace:
                insertions.append((self.braces[offset], 0, " }"))
        for start, end in self.casts.items():
            insertions += [(start, 2, "metal::__sim_aligned("), (end, -1, ")")]
        return Marked(_insert(self.text, insertions), lines)

    def _offset(self, location) -> int:
        return location.offset - self.start

    def _is_compile_time(self, function) -> bool:
        start = self._offset(function.extent.start)
        if start not in self.compile_time:
            head = self.text[start : self._offset(function.extent.end)].split("{", 1)[0]
            self.compile_time[start] = re.search(r"\bconstexpr\b", head) is not None
        return self.compile_time[start]

    def _statement(self, cursor) -> None:
        """A statement among others: a call may simply stand before it."""
        if cursor.kind in self.labels:
            self._statement(list(cursor.get_children())[-1])
        elif cursor.kind == self.kinds.COMPOUND_STMT:
            return  # its own statements will do
        elif cursor.kind != self.kinds.DECL_STMT or not self._is_silent(cursor):
            self.begins.add(self._offset(cursor.extent.start))

    def _is_silent(self, declaration) -> bool:
        """Nothing happens at a typedef or a static_assert."""
        return all(child.kind in self.silent for child in declaration.get_children())

    def _body(self, cursor) -> None:
        """The statement that an ``if`` or a loop governs: without braces it needs some."""
        if cursor.kind == self.kinds.COMPOUND_STMT:
            if not any(True for _ in cursor.get_children()):
                self.begins.add(self._offset(cursor.extent.start) + 1)
            return
        start = self._offset(cursor.extent.start)
        self.begins.add(start)
        self.braces[start] = self._end_with_semicolon(self._offset(cursor.extent.end))

    def _end_with_semicolon(self, end: int) -> int:
        if self.text[end - 1] == ";":
            return end
        semicolon = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*;", re.DOTALL).match(self.text, end)
        return semicolon.end() if semicolon else end

    def _end_of_head(self, cursor) -> int:
        """Behind the parenthesis of ``if (...)``."""
        position = self.text.index("(", self._offset(cursor.extent.start))
        depth = 0
        while True:
            depth += (self.text[position] == "(") - (self.text[position] == ")")
            position += 1
            if depth == 0:
                return position


def _insert(text: str, insertions: list[tuple[int, int, str]]) -> str:
    parts, done = [], 0
    for offset, _, insertion in sorted(insertions):
        parts += [text[done:offset], insertion]
        done = offset
    return "".join([*parts, text[done:]])
