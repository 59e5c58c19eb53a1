"""Rewrites Metal text into what clang's "C++ for OpenCL" can read, line by line.

Metal's compiler and this front end are close relatives, so little is left to do, and it can be done
on tokens. No line moves, so every message of the compilers fits the text that people wrote.

1. ``[[...]]`` goes: what it says is in the parameters. Names that Metal doesn't have are faults.
2. ``threadgroup T a[N];`` becomes a reference to memory of the runtime's.
3. ``constant T x [[function_constant(n)]];`` becomes a constant of the given value.
4. ``float4(...)`` becomes a call of a template: clang has no such call for its vectors.
5. ``thread`` goes where it qualifies a constructor or a conversion: clang couldn't call it.
6. ``#pragma unroll`` goes: it is about speed, and statements.py puts calls before loops.
7. ``0.5`` becomes ``0.5f``: Metal has no double, and clang forgets that inside of templates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .text import Token, tokens

_SCALARS = [
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "float",
    "half",
    "bfloat",
    "bool",
]
VECTORS = {f"{scalar}{size}" for scalar in _SCALARS for size in (2, 3, 4)}
ATTRIBUTES = set(
    [
        "dispatch_threads_per_threadgroup",
        "grid_origin",
        "grid_size",
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threadgroups_per_grid",
        "threads_per_grid",
        "threads_per_threadgroup",
        "dispatch_quadgroups_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup",
        "quadgroup_index_in_threadgroup",
        "quadgroups_per_threadgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "thread_execution_width",
        "thread_index_in_quadgroup",
        "thread_index_in_simdgroup",
        "thread_index_in_threadgroup",
        "threads_per_simdgroup",
        "buffer",
        "kernel",
        "host_name",
        "function_constant",
        "max_total_threads_per_threadgroup",
        "threadgroup",
        "texture",
        "maybe_unused",
        "unroll",
    ]
)
_UNROLL = re.compile(r"#[ \t]*pragma[ \t]+(?:clang[ \t]+loop|(?:no)?unroll)\b")
_FLOAT = re.compile(
    r"(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|0[xX][\da-fA-F.]+[pP][-+]?\d+"
)
_OPENING, _CLOSING = set("([{"), set(")]}")


@dataclass
class Rewritten:
    """``faults`` are (line, what is wrong)."""

    text: str
    faults: list[tuple[int, str]] = field(default_factory=list)


def rewrite(text: str, constants: dict[str, object] | None = None) -> Rewritten:
    """``constants`` are the values of function constants, by name; 0 if it has none."""
    return _Rewriter(text, constants or {}).run()


class _Rewriter:
    def __init__(self, text: str, constants: dict[str, object]):
        # Apple's comments have a copyright sign; libclang counts in bytes.
        self.tokens = tokens(text.encode("ascii", "replace").decode())
        self.out = [token.text for token in self.tokens]
        # Positions of the tokens that mean something; the methods below count in these.
        self.loud = [i for i, token in enumerate(self.tokens) if not token.silent]
        self.constants = constants
        self.faults: list[tuple[int, str]] = []
        self.classes: set[str] = set()
        self.variables = 0

    def run(self) -> Rewritten:
        for i, token in enumerate(self.tokens):
            if token.kind == "directive" and _UNROLL.match(token.text):
                self.out[i] = ""
            elif token.kind == "number" and _FLOAT.fullmatch(token.text):
                self.out[i] += "f"
        in_kernel = self._kernel_bodies()
        k = 0
        while k < len(self.loud):
            k = self._token(k, in_kernel[k]) or k + 1
        return Rewritten("".join(self.out), self.faults)

    # ---- Access to the tokens ----------------------------------------------------------------

    def word(self, k: int) -> str:
        return self.tokens[self.loud[k]].text if 0 <= k < len(self.loud) else ""

    def token(self, k: int) -> Token:
        return self.tokens[self.loud[k]]

    def replace(self, k: int, end: int, text: str) -> None:
        """Puts ``text`` in place of the tokens from ``k`` up to ``end``, and keeps the newlines."""
        for i in range(self.loud[k], self.loud[end - 1] + 1):
            old = self.tokens[i].text
            self.out[i] = old if old == "\\\n" else "\n" * old.count("\n")
        self.out[self.loud[k]] = text + self.out[self.loud[k]]

    def find(self, k: int, word: str) -> int:
        """The next ``word`` from ``k`` on, or the end."""
        while k < len(self.loud) and self.word(k) != word:
            k += 1
        return k

    def fault(self, k: int, text: str) -> None:
        self.faults.append((self.token(k).line, text))

    # ---- The pass over them --------------------------------------------------------------------

    def _kernel_bodies(self) -> list[bool]:
        """For each token, whether it is inside the body of a kernel function."""
        inside, depth, kernel_depth, pending = [], 0, None, False
        for k in range(len(self.loud)):
            word = self.word(k)
            if word == "kernel":
                pending = True
            elif word == ";" and kernel_depth is None:
                pending = False
            elif word == "{":
                if pending and kernel_depth is None and self.word(k - 1) == ")":
                    kernel_depth, pending = depth, False
                depth += 1
            elif word == "}":
                depth -= 1
                if kernel_depth is not None and depth <= kernel_depth:
                    kernel_depth = None
            inside.append(kernel_depth is not None)
        return inside

    def _token(self, k: int, in_kernel: bool) -> int | None:
        """Rewrites what begins at ``k``; returns where to go on, if not at the next token."""
        word = self.word(k)
        if word == "[[":
            return self._attribute(k)
        if word in ("struct", "class") and self.word(k + 1) != "{":
            self.classes.add(self.word(k + 1))
        elif word == "thread":
            self._thread_qualifier(k)
        elif word == "threadgroup":
            return self._threadgroup_variable(k, in_kernel)
        elif word == "constant" and self.word(k + 3) == "[[":
            return self._function_constant(k)
        elif word in VECTORS and self.word(k + 1) == "(":
            if self.word(k - 1) not in ("::", "operator"):
                self.out[self.loud[k]] = f"metal::__sim_make<{word}>"
        elif word == "vec" and self.word(k + 1) == "<":
            self._vec_constructor(k)
        return None

    def _attribute(self, k: int) -> int:
        end = self.find(k, "]]")
        depth = 0
        for j in range(k + 1, end):
            word = self.word(j)
            depth += (word == "(") - (word == ")")
            if depth == 0 and self.token(j).kind == "name" and word not in ATTRIBUTES:
                self.fault(j, f"unknown attribute [[{word}]]")
            if word == "buffer" and self.word(j + 2).isdigit() and int(self.word(j + 2)) > 30:
                self.fault(j, f"buffer index {self.word(j + 2)}: Metal has 31 buffers, 0 to 30")
        self.replace(k, min(end + 1, len(self.loud)), "")
        return end + 1

    def _thread_qualifier(self, k: int) -> None:
        """``thread`` after a parameter list: a method's qualifier."""
        if self.word(k + 1) not in ("{", ":", ";", "=", "noexcept"):
            return
        closing = k - 1 - (self.word(k - 1) == "const")
        if self.word(closing) != ")":
            return
        opening = self._matching_parenthesis(closing)
        is_constructor = self.word(k + 1) == ":" or self.word(opening - 1) in self.classes
        if is_constructor or self._is_conversion(opening):
            self.out[self.loud[k]] = ""

    def _matching_parenthesis(self, k: int) -> int:
        depth = 0
        while k >= 0:
            depth += (self.word(k) == ")") - (self.word(k) == "(")
            if depth == 0:
                break
            k -= 1
        return k

    def _is_conversion(self, opening: int) -> bool:
        """``operator T()``, unlike ``operator+()``: a name or a template's end before the list."""
        before = [self.word(k) for k in range(max(0, opening - 8), opening)]
        if "operator" not in before:
            return False
        last = before[-1]
        type_words = before[before.index("operator") :]
        return not {";", "{", "}"} & set(type_words) and (last[0].isalpha() or last in (">", "_"))

    def _function_constant(self, k: int) -> int | None:
        end = self.find(k, ";")
        if "function_constant" not in [self.word(j) for j in range(k, end)]:
            return None
        kind, name = self.word(k + 1), self.word(k + 2)
        value = self.constants.get(name, 0)
        number = str(value).lower() if isinstance(value, bool) else str(value)
        self.replace(k, end, f"constant {kind} {name} = {number}")
        return end

    def _vec_constructor(self, k: int) -> None:
        """``vec<T, 4>(...)``, also as ``metal::vec``."""
        end, depth = k + 1, 0
        while end < len(self.loud):
            depth += {"<": 1, ">": -1, ">>": -2}.get(self.word(end), 0)
            if depth <= 0:
                break
            end += 1
        if self.word(end) != ">" or self.word(end + 1) != "(" or self.word(k - 1) == "operator":
            return
        start = self.loud[k - 2 if self.word(k - 1) == "::" else k]
        self.out[start] = "metal::__sim_make<" + self.out[start]
        self.out[self.loud[end]] = ">>"

    def _threadgroup_variable(self, k: int, in_kernel: bool) -> int | None:
        """A declaration; pointers and references to threadgroup memory stay as they are."""
        if self.word(k - 1) not in ("", "{", ";", "}", ")", ":", "static", "volatile"):
            return None
        end = k
        while self.word(end) not in ("", ";", "{", "}"):
            end += 1
        words = [self.word(j) for j in range(k + 1, end)]
        name = _declared_name(words)
        if self.word(end) != ";" or name is None:
            return None
        if "=" in words:
            self.fault(k, "a threadgroup variable can't have an initializer")
            return None
        if not in_kernel:
            self.fault(k, f"threadgroup variable '{words[name]}' outside of a kernel function")
        kind = " ".join(words[:name])
        declarators = _split_at_commas(words[name:])
        parts = [self._variable(kind, declarator) for declarator in declarators]
        self.replace(k, end, "; ".join(parts))
        return end

    def _variable(self, kind: str, declarator: list[str]) -> str:
        self.variables += 1
        name, dimensions = declarator[0], " ".join(declarator[1:])
        make = f'metal::__sim_variable<{kind}{dimensions}>("{name}#{self.variables}")'
        return f"threadgroup {kind} (&{name}){dimensions} = {make}"


def _declared_name(words: list[str]) -> int | None:
    """Where in ``T<a, b> name[N], other`` the first name stands; None if there is no variable."""
    depth, found = 0, None
    for i, word in enumerate(words):
        depth += {"<": 1, ">": -1, ">>": -2}.get(word, 0)
        if depth == 0 and word in ("*", "&", "("):
            return None
        if depth == 0 and word in ("[", ",", "="):
            break
        if depth == 0 and (word[0].isalpha() or word[0] == "_"):
            found = i
    return found or None


def _split_at_commas(words: list[str]) -> list[list[str]]:
    parts, depth = [[]], 0
    for word in words:
        depth += (word in _OPENING or word == "<") - (word in _CLOSING or word == ">")
        if word == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
