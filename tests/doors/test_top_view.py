"""What `mlxpage top` draws, of snapshots made by hand."""

import copy
import re

import pytest

from mlxpage.cli.top_view import HUES, History, lines

STATS = {
    "steps": 10,
    "sampled_tokens": 100,
    "computed_tokens": 400,
    "preemptions": 1,
    "resizes": {"grown": 0, "shrunk": 0},
    "backend": {"name": "reference"},
    "prefix_cache": {"queried_tokens": 200, "hit_tokens": 50, "evictions": 3},
    "bytes": {"pool": 72e6, "weights": 538e6, "active": 610e6, "peak": 7e8, "budget": 12.6e9},
}


def group(states: str, kind="all", **changes) -> dict:
    counts = {
        "total": len(states),
        "limit": len(states),
        "used": states.count("#") + states.count("S"),
        "shared": states.count("S"),
        "cached": states.count("c"),
        "free": states.count("."),
    }
    made = {"kind": kind, "window": None, "block_size": 16, "block_bytes": 737_280}
    return made | {"blocks": counts, "map": states} | changes


def sequence(id: int, *tables: list[int], state="running", **changes) -> dict:
    made = {"id": id, "state": state, "prompt_tokens": 20, "cached_tokens": 16}
    made |= {"computed_tokens": 30, "output_tokens": 10, "max_output_tokens": 64}
    return made | {"preemptions": 0, "age_s": 61.5, "tables": list(tables) or [[]]} | changes


def snapshot(*groups: dict, sequences=(), time=100.0, **stats) -> dict:
    hello = {"schema": "mlxpage.top/1", "engine": "42-1", "pid": 42, "model": "m", "started": 40.0}
    return hello | {
        "time": time,
        "groups": list(groups),
        "sequences": list(sequences),
        "stats": copy.deepcopy(STATS) | stats,
    }


def history(*snapshots: dict) -> History:
    made = History()
    for each in snapshots:
        made.add(each)
    return made


def drawn(*snapshots: dict, width=80, height=24, **options) -> list[str]:
    return [line.plain for line in lines(history(*snapshots), width, height, **options)]


def rows_of_map(frame: list[str]) -> list[str]:
    begin = next(i for i, line in enumerate(frame) if line.startswith("pages"))
    end = next(i for i, line in enumerate(frame) if "free" in line and i > begin)
    return frame[begin + 1 : end]


def rows_of_sequences(frame: list[str]) -> list[str]:
    return frame[next(i for i, line in enumerate(frame) if "block table" in line) + 1 :]


def strip(frame: list[str], id: int) -> str:
    row = next(line for line in frame if line.split()[:1] == [str(id)])
    return row[55:]


def test_each_block_has_a_cell_of_its_state():
    pool = "SS##cc.." * 100
    shown = snapshot(group(pool))
    assert "".join(rows_of_map(drawn(shown))) == pool.translate(str.maketrans("S#c.", "◆■□·"))
    assert "".join(rows_of_map(drawn(shown, letters=True))) == pool


def test_a_small_pool_has_room_between_its_cells():
    assert rows_of_map(drawn(snapshot(group("S#c.")), letters=True)) == ["S # c . "]


def test_letters_are_ascii_without_a_style():
    sequences = [sequence(1, [1, 2]), sequence(2, state="waiting")]
    shown = [snapshot(group("S#c." * 8), sequences=sequences, time=at) for at in (1.0, 2.0)]
    for line in lines(history(*shown), 80, 24, letters=True):
        assert line.plain.isascii()
        assert not [span for span in line.spans if str(span.style) not in ("dim", "bold", "")]


def test_a_cell_of_a_large_pool_stands_for_several_blocks():
    pool = "#" * 50_000 + "c" * 20_000 + "." * 30_000
    frame = drawn(snapshot(group(pool)), letters=True)
    per_cell = -(-100_000 // (80 * 16))
    cells = "".join(rows_of_map(frame))
    assert any(f"{per_cell} a cell" in line for line in frame)
    for state, count in {"#": 50_000, "c": 20_000, ".": 30_000}.items():
        assert abs(cells.count(state) - count / per_cell) <= 1


def test_a_shade_is_how_many_of_its_blocks_hold_something():
    parts = ["#" * held + "." * (100 - held) for held in (0, 1, 25, 26, 50, 75, 76, 100)]
    assert rows_of_map(drawn(snapshot(group("".join(parts * 10))), height=9)) == ["·░░▒▒▓██" * 10]


def test_what_was_taken_and_freed_since_the_last_look_is_shown_once():
    one, two = snapshot(group("##.c....")), snapshot(group(".S##...."))
    assert rows_of_map(drawn(one, two)) == ["▒ ◆ █ █ · · · · "]
    assert rows_of_map(drawn(one, two, two)) == ["· ◆ ■ ■ · · · · "]
    grown = snapshot(group("##.c....##.."))
    assert rows_of_map(drawn(one, grown)) == ["■ ■ · □ · · · · ■ ■ · · "]


def test_a_block_has_the_colour_of_its_sequence():
    sequences = [sequence(id, [id]) for id in (1, 2, 13)]
    of_all = history(snapshot(group("##..........#"), sequences=sequences))
    frame = lines(of_all, 80, 24)
    (cells,) = [line for line in frame if line.plain.startswith("■ ■")]
    styles = [str(span.style) for span in cells.spans if cells.plain[span.start] == "■"]
    assert styles == [of_all.hues[id] for id in (1, 2, 13)] == HUES[:3]
    # One that goes on keeps it, whoever comes and goes.
    of_all.add(snapshot(group("##..........#"), sequences=[sequences[2], sequence(3, [1])]))
    assert of_all.hues == {13: HUES[2], 3: HUES[0]}


def test_a_table_shows_what_is_shared_given_back_and_how_full_its_last_block_is():
    pool = group("SS##....")
    sequences = [
        sequence(7, [1, 2, 3], computed_tokens=33),
        sequence(8, [0, 2, 4], computed_tokens=48),
        sequence(9, state="preempted"),
    ]
    frame = drawn(snapshot(pool, sequences=sequences))
    assert [strip(frame, id).strip() for id in (7, 8, 9)] == ["◆◆▁", "-◆■", ""]
    assert strip(drawn(snapshot(pool, sequences=sequences), letters=True), 7) == "SS#"
    assert "2 running, 1 preempted" in "\n".join(frame)


@pytest.mark.parametrize("blocks", [25, 26, 27, 1000])
def test_of_a_long_table_both_ends_are_shown(blocks):
    pool = group("S" * 8 + "#" * (blocks - 8))
    shown = sequence(5, list(range(1, blocks + 1)))
    row = strip(drawn(snapshot(pool, sequences=[shown]), letters=True), 5)
    first, more, last = re.fullmatch(r"(S+#+)(\+\d+)?(#*)", row).groups()
    assert len(first) + len(last) + int(more or 0) == blocks
    assert 22 <= len(row) <= 25 and bool(more) == (blocks > 25)


def test_a_prompt_tells_how_much_of_it_is_computed():
    shown = sequence(1, [1], prompt_tokens=1000, computed_tokens=250, output_tokens=0)
    assert "prompt 25%" in "\n".join(drawn(snapshot(group("#"), sequences=[shown])))


def test_each_cache_group_has_its_map():
    groups = group("#" * 80), group("S" * 80, "window", window=512), group("c" * 80, "states")
    frame = drawn(snapshot(*groups, sequences=[sequence(1, [1], [1], [1])]), height=30)
    text = "\n".join(frame)
    assert "pages (window 512)" in text and "pages (states)" in text
    assert {"■", "◆", "□"} <= {line[0] for line in frame if len(set(line.replace(" ", ""))) == 1}


def test_rates_are_of_the_last_seconds():
    looks = [
        snapshot(
            group("."), time=100.0 + at, sampled_tokens=100 + 20 * at, computed_tokens=400 + 70 * at
        )
        for at in range(8)
    ]
    text = "\n".join(drawn(*looks))
    assert "20.0 tok/s" in text and "prompts 50 tok/s" in text and "█" * 7 in text
    stopped = copy.deepcopy(looks[-1]) | {"time": 120.0}
    assert "0.0 tok/s" in "\n".join(drawn(*looks, stopped, stopped | {"time": 124.0}))


def test_counts_are_told():
    text = "\n".join(drawn(snapshot(group("##c.")), note="q quits"))
    for told in ("25 % of 200", "3 evictions", "1 preemption\n", "538 MB", "of 12.6 GB", "up 1:00"):
        assert told in text, told
    assert text.split("\n")[0].endswith("q quits")
    assert "no prefix cache" in "\n".join(drawn(snapshot(group("."), prefix_cache=None)))
    assert "resized 3x" in "\n".join(drawn(snapshot(group("."), resizes={"grown": 2, "shrunk": 1})))


@pytest.mark.parametrize("letters", [False, True])
@pytest.mark.parametrize("width, height", [(80, 24), (120, 40), (300, 90), (40, 12), (10, 3)])
@pytest.mark.parametrize("blocks", [1, 96, 4096, 100_000])
def test_a_frame_fits_its_terminal(width, height, letters, blocks):
    pool = ("S#c." * blocks)[:blocks]
    for count in (0, 1, 5, 200):
        sequences = [
            sequence(id, list(range(1, blocks + 1, 1 + blocks // 99))) for id in range(count)
        ]
        shown = snapshot(group(pool), group(pool, "window", window=64), sequences=sequences)
        for each in shown["sequences"]:
            each["tables"] *= 2
        frame = drawn(shown, width=width, height=height, letters=letters, note="a note")
        assert len(frame) <= height and max(map(len, frame)) <= width
        if height >= 24:
            assert rows_of_map(frame)
            rows = rows_of_sequences(frame)
            if count <= 5:
                assert len(rows) == count
            else:
                assert rows[-1].split() == ["and", f"{count - len(rows) + 1}", "more"]
