"""What `mlxpage top` shows: snapshots of an engine as lines of text. No terminal is needed here."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from mlxpage.block_pool import CACHED, FREE, NULL_BLOCK, SHARED, USED
from mlxpage.sizes import gigabytes

Cell = tuple[str, str]
"""A letter and its style."""

HUES = [f"color({n})" for n in (33, 208, 35, 169, 37, 136, 98, 160, 69, 107, 173, 132)]
"""Of sequences; they can be told from each other, and from a dark or a light background."""
STYLES = {FREE: "dim", CACHED: "bright_black", USED: HUES[0], SHARED: "bold"}
GLYPHS = {FREE: "·", CACHED: "□", USED: "■", SHARED: "◆"}
TAKEN, FREED = "█", "▒"
"""Blocks that were free at the last look, and that were used."""
GIVEN_BACK = "-"
SHADES = "░▒▓█"
LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-=+*#@"
LEVELS_OF_BLOCK = "▁▂▃▄▅▆"
"""None as high as a full one."""
MOST_TO_LEAST = SHARED + USED + CACHED

RATE_SECONDS = 3.0  # that a rate is the mean of
COLUMNS = "{:>5}  {:<10}{:>8}{:>8}{:>13}{:>7}  "


class History:
    """The last snapshot, and what of those before it is shown as well."""

    def __init__(self) -> None:
        self.snapshot: dict[str, Any] | None = None
        self.before: list[str] = []
        """The maps of the snapshot before the last."""
        self.rates: deque[float] = deque(maxlen=500)
        """Tokens sampled in a second, at each look."""
        self.prompt_rate = 0.0
        self.hues: dict[int, str] = {}
        """Of the sequences that have blocks, by their ids."""
        self._counts: deque[tuple[float, int, int]] = deque()

    def add(self, snapshot: dict[str, Any]) -> None:
        last = self.snapshot or snapshot
        self.before = [group["map"] for group in last["groups"]]
        self.snapshot = snapshot
        self._colour(snapshot["sequences"])
        stats = snapshot["stats"]
        sampled = stats["sampled_tokens"]
        # A step computes a position for each token of a prompt, and one for each token after it.
        now = snapshot["time"], sampled, stats["computed_tokens"] - sampled
        self._counts.append(now)
        while len(self._counts) > 2 and now[0] - self._counts[1][0] >= RATE_SECONDS:
            self._counts.popleft()
        then = self._counts[0]
        if (seconds := now[0] - then[0]) > 0:
            self.rates.append((now[1] - then[1]) / seconds)
            self.prompt_rate = max(0.0, (now[2] - then[2]) / seconds)

    def _colour(self, sequences: list[dict[str, Any]]) -> None:
        """Each keeps its hue as long as it has blocks; a new one gets that which fewest have."""
        holding = {sequence["id"] for sequence in sequences if any(sequence["tables"])}
        self.hues = {id: hue for id, hue in self.hues.items() if id in holding}
        for id in sorted(holding):
            taken = Counter(self.hues.values())
            self.hues.setdefault(id, min(HUES, key=taken.__getitem__))


def lines(
    history: History, width: int, height: int, *, letters: bool = False, note: str = ""
) -> list[Text]:
    """A frame of at most so many columns and lines. With `letters` it's ASCII that needs no colour.
    `note` stands at the right of the first line."""
    page = _Page(history, width, letters)
    head = [page.title(note), *page.facts()]
    sequences = history.snapshot["sequences"]
    left = height - len(head)
    wanted = page.rows_of_maps(), len(sequences) + 2
    gap = [Text()] if sum(wanted) + 2 <= left else []
    left -= 2 * len(gap)
    # Who needs less than a half leaves the rest to the other.
    for_sequences = min(wanted[1], max(left // 2, left - wanted[0]))
    maps, rows = page.maps(left - for_sequences), page.sequences(for_sequences)
    drawn = [*head, *gap, *maps, *gap, *rows][:height]
    for line in drawn:
        line.truncate(width)
    return drawn


class _Page:
    def __init__(self, history: History, width: int, letters: bool):
        self._history, self._width, self._letters = history, width, letters
        self._snapshot = history.snapshot
        self._stats = self._snapshot["stats"]
        self._groups = self._snapshot["groups"]

    # -- counts --

    def title(self, note: str) -> Text:
        shown, stats = self._snapshot, self._stats
        up = _duration(shown["time"] - shown["started"])
        title = Text.assemble(
            ("mlxpage top", "bold"),
            f"  {_name(shown['model'])}  ",
            (f"engine {shown['engine']}  {stats['backend']['name']}  up {up}", "dim"),
        )
        title.truncate(max(0, self._width - len(note) - 1))
        return title.append(" " * (self._width - len(title) - len(note))).append(note, "dim")

    def facts(self) -> list[Text]:
        stats, history = self._stats, self._history
        sizes, cache = stats["bytes"], stats["prefix_cache"]
        resized = sum(stats["resizes"].values())
        rate = history.rates[-1] if history.rates else 0.0
        return [
            _fact(
                "tokens",
                (f"{rate:.1f} tok/s ", "bold"),
                (self._sparkline(24), "" if self._letters else HUES[2]),
                f" prompts {history.prompt_rate:,.0f} tok/s",
                (f"  {stats['sampled_tokens']:,} in {stats['steps']:,} steps", "dim"),
            ),
            _fact(
                "prefixes",
                *_prefixes(cache),
                f"  {_count(stats['preemptions'], 'preemption')}",
            ),
            _fact(
                "memory",
                (f"pool {gigabytes(sizes['pool'])}", "bold"),
                (f", resized {resized}x" if resized else "", "dim"),
                f"  weights {gigabytes(sizes['weights'])}  active {gigabytes(sizes['active'])}"
                f"  peak {gigabytes(sizes['peak'])}",
                (f" of {gigabytes(sizes['budget'])}", "dim"),
            ),
        ]

    def _sparkline(self, width: int) -> str:
        levels = ASCII_LEVELS if self._letters else LEVELS
        rates = list(self._history.rates)[-width:]
        top = max(rates, default=0) or 1
        return "".join(_level(levels, rate / top) for rate in rates)

    # -- pools --

    def rows_of_maps(self) -> int:
        """Lines in which all maps have a cell for each block, with their titles and the legend."""
        rows = (-(-len(group["map"]) // self._width) for group in self._groups)
        return sum(rows) + len(self._groups) + 1

    def maps(self, height: int) -> list[Text]:
        """The pools, each under its title, as far as there are lines for them."""
        shown, are_shaded = [], True
        for index, group in enumerate(self._groups):
            left = len(self._groups) - index
            # The legend takes one line, and each that follows its share.
            rows = max(1, (height - 1 - len(shown)) // left - 1)
            if len(shown) + 2 > height - 1:
                break
            per_cell = -(-len(group["map"]) // (rows * self._width))
            cells = self._cells(index) if per_cell == 1 else self._shaded_cells(index, per_cell)
            are_shaded &= per_cell > 1
            gap = " " if 2 * len(cells) <= rows * self._width else ""
            columns = self._width // len(gap + "x")
            shown.append(self._title_of_group(group, per_cell))
            shown += [_joined(cells[i : i + columns], gap) for i in range(0, len(cells), columns)]
        return [*shown, self._legend(are_shaded)]

    def _title_of_group(self, group: dict[str, Any], per_cell: int) -> Text:
        blocks = group["blocks"]
        of = {"all": "", "window": f" (window {group['window']})", "states": " (states)"}
        size = f"{group['block_size']} tokens, {gigabytes(group['block_bytes'])}"
        told = size if per_cell == 1 else f"{per_cell:,} a cell"
        return self._rule(
            f"pages{of[group['kind']]}",
            f"{blocks['used']:,} of {blocks['total']:,} used, {blocks['shared']:,} shared, "
            f"{blocks['cached']:,} cached",
            told,
        )

    def _cells(self, index: int) -> list[Cell]:
        """One for each block, with what has changed since the last look."""
        states, before = self._groups[index]["map"], self._history.before[index]
        owners = self._owners(index)
        cells = [self._cell(state, owners.get(i)) for i, state in enumerate(states, start=1)]
        if not self._letters:
            for i, (was, state) in enumerate(zip(before, states, strict=False)):
                if _is_held(was) != _is_held(state):
                    cells[i] = TAKEN if _is_held(state) else FREED, cells[i][1]
        return cells

    def _shaded_cells(self, index: int, per_cell: int) -> list[Cell]:
        """One for so many blocks: how many of them hold something, and what most of those are."""
        states, owners = self._groups[index]["map"], self._owners(index)
        cells = []
        for at in range(0, len(states), per_cell):
            blocks = states[at : at + per_cell]
            held = len(blocks) - blocks.count(FREE)
            most = max(MOST_TO_LEAST, key=blocks.count) if held else FREE
            glyph, style = self._cell(most, owners.get(states.find(USED, at) + 1))
            if held and not self._letters:
                glyph = SHADES[-(-len(SHADES) * held // len(blocks)) - 1]
            cells.append((glyph, style))
        return cells

    def _owners(self, index: int) -> dict[int, str]:
        """Block -> hue of the sequence that has it."""
        return {
            block: self._history.hues[sequence["id"]]
            for sequence in self._snapshot["sequences"]
            for table in sequence["tables"][index : index + 1]
            for block in table
        }

    def _cell(self, state: str, hue: str | None) -> Cell:
        if self._letters:
            return state, ""
        return GLYPHS[state], hue if state == USED and hue else STYLES[state]

    def _legend(self, are_shaded: bool) -> Text:
        used = "used" if self._letters else "used, by colour"
        names = {USED: used, SHARED: "shared", CACHED: "cached", FREE: "free"}
        shown = [(self._cell(state, None), name) for state, name in names.items()]
        if not self._letters and are_shaded:
            shown = [((SHADES[-1], STYLES[state]), names[state]) for state in MOST_TO_LEAST]
            shown += [
                ((GLYPHS[FREE], STYLES[FREE]), "free"),
                ((SHADES, "dim"), "so many of a cell"),
            ]
        elif not self._letters:
            shown += [((TAKEN, STYLES[USED]), "just taken"), ((FREED, "dim"), "just freed")]
        legend = Text()
        for cell, name in shown:
            legend.append(*cell).append(f" {name}  ", "dim")
        return legend

    # -- sequences --

    def sequences(self, height: int) -> list[Text]:
        """A table under a title."""
        sequences = self._snapshot["sequences"]
        counts = Counter(sequence["state"] for sequence in sequences)
        told = ", ".join(f"{count:,} {state}" for state, count in counts.items()) or "none"
        header = Text(COLUMNS.format("id", "state", "prompt", "cached", "output", "age"), "dim")
        shown = [self._rule("sequences", told), header.append("block table")]
        rows = max(0, height - len(shown))
        if len(sequences) > rows > 0:
            more = Text(f"       and {len(sequences) - rows + 1:,} more", "dim")
            return [*shown, *map(self._row, sequences[: rows - 1]), more]
        return [*shown, *map(self._row, sequences[:rows])]

    def _row(self, sequence: dict[str, Any]) -> Text:
        state, prompt = sequence["state"], sequence["prompt_tokens"]
        computed = sequence["computed_tokens"]
        if state == "running" and computed < prompt:
            state = f"prompt {100 * computed // prompt}%"
        output = f"{sequence['output_tokens']:,}/{sequence['max_output_tokens']:,}"
        age, cached = _duration(sequence["age_s"]), f"{sequence['cached_tokens']:,}"
        columns = COLUMNS.format(sequence["id"], state, f"{prompt:,}", cached, output, age)
        waits = sequence["state"] != "running"
        row = Text(columns, "dim" if waits else "")
        hue = self._history.hues.get(sequence["id"])
        if hue and not self._letters:
            row.stylize(hue, 0, 5)
        return row.append(_joined(self._strip(sequence, self._width - len(columns)), ""))

    def _strip(self, sequence: dict[str, Any], width: int) -> list[Cell]:
        """The blocks of a sequence, first to last, and how full the last one is; of a long table
        both ends, and how many there are between them."""
        index = max(range(len(self._groups)), key=lambda i: self._groups[i]["blocks"]["limit"])
        group, table = self._groups[index], sequence["tables"][index]
        hue = self._history.hues.get(sequence["id"])
        cells = [self._cell_of_table(group["map"], block, hue) for block in table]
        size = group["block_size"]
        filled = sequence["computed_tokens"] - (len(table) - 1) * size
        if cells and filled < size and cells[-1][0] == GLYPHS[USED]:
            cells[-1] = _level(LEVELS_OF_BLOCK, filled / size), hue
        if len(cells) <= width:
            return cells
        end = max(0, width - len(f"+{len(cells):,}")) // 2
        between = [(letter, "dim") for letter in f"+{len(cells) - 2 * end:,}"]
        return [*cells[:end], *between, *cells[len(cells) - end :]]

    def _cell_of_table(self, states: str, block: int, hue: str) -> Cell:
        return (GIVEN_BACK, "dim") if block == NULL_BLOCK else self._cell(states[block - 1], hue)

    def _rule(self, name: str, told: str, aside: str = "") -> Text:
        rule = Text.assemble((name, "bold"), f"  {told}")
        aside = f"  {aside}" if aside else ""
        line = ("-" if self._letters else "─") * (self._width - len(rule) - len(aside) - 2)
        return rule.append(f"  {line}{aside}", "dim")


def _fact(name: str, *parts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{name:<10}", "dim"), *parts)


def _prefixes(cache: dict[str, Any] | None) -> Iterable[str | tuple[str, str]]:
    if cache is None:
        return ["no prefix cache"]
    queried = cache["queried_tokens"]
    share = 100 * cache["hit_tokens"] / queried if queried else 0.0
    found = f" of {queried:,} prompt tokens found"
    return [(f"{share:.0f} %", "bold"), found, f"  {_count(cache['evictions'], 'eviction')}"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _level(levels: str, share: float) -> str:
    """The first for next to nothing, the last for all."""
    return levels[min(len(levels) - 1, max(0, int(len(levels) * share)))]


def _name(model: str) -> str:
    """Of a folder, its last part."""
    return os.path.basename(model) if os.path.isabs(model) else model


def _is_held(state: str) -> bool:
    return state in USED + SHARED


def _joined(cells: list[Cell], gap: str) -> Text:
    return Text.assemble(*_runs(cells, gap))


def _runs(cells: list[Cell], gap: str) -> Iterator[Cell]:
    for style, run in groupby(cells, key=lambda cell: cell[1]):
        for glyph, _ in run:
            yield glyph, style
            yield gap, ""
