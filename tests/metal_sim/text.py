"""Metal text: its tokens, its kernels' parameters, and whose file each of its lines is from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import SimulatorError

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\f\v]+|\\\n)
  | (?P<newline>\n)
  | (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<directive>\#[ \t]*
        (?:include|pragma|line|error|undef|ifdef|ifndef|if|elif|else|endif)\b[^\n]*)
  | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<attribute>\[\[|\]\])
  | (?P<operator>::|->|<<=|>>=|[-+*/%&|^=!<>]=|&&|\|\||\+\+|--|<<|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SILENT = {"space", "newline", "comment", "directive"}


@dataclass
class Token:
    kind: str
    text: str
    line: int

    @property
    def silent(self) -> bool:
        """Space, a comment or a preprocessor line."""
        return self.kind in _SILENT


def tokens(text: str) -> list[Token]:
    """All of the text: joined again, the tokens are what they came from."""
    found, line = [], 1
    for match in _TOKEN.finditer(text):
        found.append(Token(match.lastgroup or "", match.group(), line))
        line += match.group().count("\n")
    return found


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: ``uint3 position [[thread_position_in_grid]]``."""

    type: tuple[str, ...]
    name: str
    attribute: str
    index: int | None

    @property
    def is_reference(self) -> bool:
        return "&" in self.type


def parameters(text: str, kernel: str) -> list[Parameter]:
    """The parameters of the kernel with this name."""
    words = [token.text for token in tokens(text) if not token.silent]
    for i in range(1, len(words) - 1):
        if words[i - 1 : i + 2] == ["void", kernel, "("]:
            return [_parameter(part) for part in _split_parameters(words[i + 2 :])]
    raise SimulatorError(f"The text has no kernel {kernel!r}.")


def _split_parameters(words: list[str]) -> list[list[str]]:
    parts, part, depth = [], [], 0
    for word in words:
        if word == ")" and depth == 0:
            return [*parts, part]
        depth += {"(": 1, "<": 1, "[": 1, "[[": 1}.get(word, 0)
        depth -= {")": 1, ">": 1, "]": 1, "]]": 1, ">>": 2}.get(word, 0)
        if word == "," and depth == 0:
            parts.append(part)
            part = []
        else:
            part.append(word)
    raise SimulatorError("A kernel's parameter list doesn't end.")


def _parameter(words: list[str]) -> Parameter:
    if "[[" not in words:
        raise SimulatorError(f"The parameter '{' '.join(words)}' has no attribute.")
    start = words.index("[[")
    attribute = words[start + 1 : words.index("]]")]
    index = int(attribute[2]) if attribute[1:2] == ["("] else None
    return Parameter(tuple(words[: start - 1]), words[start - 1], attribute[0], index)


@dataclass(frozen=True)
class Place:
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


_LINE_DIRECTIVE = re.compile(r'^[ \t]*#[ \t]*line[ \t]+(\d+)(?:[ \t]+"([^"]*)")?[ \t]*$')


class KernelText:
    """The text that Metal would compile, and where its lines come from.

    The text that MLX generates is the header, a signature, the body and an instantiation. Lines of
    the body are told as ``name.metal:1`` and on, lines of the header as ``name.h.metal:1`` and on,
    unless a ``#line 12 "file"`` in them says better. A text without either is ``file`` as it is.
    """

    def __init__(self, text: str, file: str, *, header: str = "", body: str = ""):
        self.file = file
        self.lines = text.split("\n")
        self._places: list[Place | None] = [None] * len(self.lines)
        if header:
            self._name_lines(text.find(header), header, header_name(file), text)
        if header or body:
            self._name_lines(text.rfind(body), body, file, text)
        else:
            self._name_lines(0, text, file, text)
        self.own = [place is not None for place in self._places]
        self._follow_line_directives()
        self.text = "\n".join(self.lines)

    def place(self, line: int) -> Place:
        """Where line ``line`` of the text, counted from 1, comes from."""
        if not 0 < line <= len(self._places):
            return Place(self.file, 0)
        return self._places[line - 1] or Place(f"{self.file} (generated)", line)

    def line_text(self, line: int) -> str:
        return self.lines[line - 1] if 0 < line <= len(self.lines) else ""

    def _name_lines(self, start: int, part: str, file: str, text: str) -> None:
        first = text.count("\n", 0, start)
        for number in range(part.rstrip("\n").count("\n") + 1):
            self._places[first + number] = Place(file, number + 1)

    def _follow_line_directives(self) -> None:
        """Takes them out, for the compilers must count the text's own lines, and remembers them."""
        offset, file, part = 0, "", ""
        for i, line in enumerate(self.lines):
            place = self._places[i]
            if place is None or place.file != part:
                part, file = place.file if place else "", ""
            if directive := _LINE_DIRECTIVE.match(line):
                self.lines[i] = ""
                offset = int(directive[1]) - (i + 2)
                file = directive[2] or file or part
            elif file:
                self._places[i] = Place(file, i + 1 + offset)


def header_name(file: str) -> str:
    """What the header of the kernel in ``file`` is called."""
    stem, dot, ending = file.rpartition(".")
    return f"{stem}.h{dot}{ending}" if dot else f"{file}.h"
