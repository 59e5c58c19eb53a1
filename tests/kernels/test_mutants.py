# ruff: noqa: E501
"""Kernels with a mistake are found out: each of these texts fails a few small cases.

A mutant that nothing catches says that a check is missing, in the cases or in the simulator.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter

import metal_sim
import numpy as np
import paging
import pytest
import test_attention
import test_latent
import test_moving
from paging import ONE_RUN, TOLERANCE

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import launch

ATTENTION, MERGE, COMMON = "paged_attention.metal", "merge_partials.metal", "common.h"
LATENT = "latent_attention.metal"
WRITE, GATHER, COPY = "write_kv.metal", "gather_blocks.metal", "copy_blocks.metal"

# (text, what is there, what stands there instead)
MUTANTS = [
    (ATTENTION, "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    (ATTENTION, "at <= last_key && at > first_key", "at <= last_key"),
    (ATTENTION, "total *= factor;", ""),
    (ATTENTION, "int next_key = min(group_begin, last_rows);", "int next_key = group_begin;"),
    (ATTENTION, "if (simd_any(exceeds)) {", "if (exceeds) {"),
    (MERGE, "if (row >= ints[0]) {", "if (row > ints[0]) {"),
    (MERGE, "SINKS && lane == 0 ?", "SINKS ?"),
    (WRITE, "if (row >= ints[0]) {", "if (row > ints[0]) {"),
    (GATHER, "const bool exists = position < lengths[sequence];", "const bool exists = true;"),
    (COMMON, "to[1] = as_type<float>(word & 0xffff0000u);", "to[1] = as_type<float>(word);"),
    (ATTENTION, "const int last_key = min(position, end - 1);", "const int last_key = position;"),
    (ATTENTION, "const int first_key = position - window;", "const int first_key = position - window + 1;"),
    (ATTENTION, "const int position = context - rows +", "const int position = context - 1 +"),
    (ATTENTION, "const int lane = simd_lane % LANES;", "const int lane = simd_lane;"),
    (ATTENTION, "constexpr int STRIDE = SIMD_GROUPS * STEP;", "constexpr int STRIDE = STEP;"),
    (ATTENTION, "step < end; step += STRIDE", "step + STEP < end; step += STRIDE"),
    (ATTENTION, "part += queries[query][e] * elements[e];", "part += queries[0][e] * elements[e];"),
    (ATTENTION, "&& (lane & mask) != 0;", "&& (lane & mask) == 0;"),
    (ATTENTION, "scores[0] += simd_shuffle_xor(scores[0], ushort(mask));", ""),
    (ATTENTION, "sums[i][j] *= of_query;", ""),
    (ATTENTION, "simd_shuffle(factor, ushort(i * QUERY_LANES))", "simd_shuffle(factor, ushort(i))"),
    (ATTENTION, "score / OWN * COPIES);", "score / OWN);"),
    (ATTENTION, "largest = new_largest;", ""),
    (ATTENTION, "scores[i] = fast::exp2(scores[i] - largest);", "scores[i] = fast::exp2(scores[i]);"),
    (ATTENTION, "next_key = min(next_key + STRIDE, last_rows);", ""),
    (ATTENTION, "next_key + STRIDE, last_rows);\nnext_block = table[next_key / BLOCK_SIZE];", "next_key + STRIDE, last_rows);"),
    (ATTENTION, "for (int mask = COPIES; mask < QUERY_LANES; mask *= 2) {", "for (int mask = 1; mask < QUERY_LANES; mask *= 2) {"),
    (ATTENTION, "if (key_group == 0 && lane % QUERY_LANES == 0) {", "if (lane % QUERY_LANES == 0) {"),
    (ATTENTION, "group_sums[SIMD_GROUPS * QUERIES * V_DIM];", "group_sums[SIMD_GROUPS * QUERIES * V_DIM - 4];"),
    (ATTENTION, "i < min(QUERIES, num_queries) * V_DIM", "i < QUERIES * V_DIM"),
    (ATTENTION, "i < min(QUERIES, num_queries) * V_DIM", "i < min(QUERIES, num_queries) * V_DIM - 1"),
    (ATTENTION, "all_total += weight * group_total", "all_total += group_total"),
    (ATTENTION, "SINKS && !SPLIT ? fast::exp2(sink - all_largest) : 0.0f;", "0.0f;"),
    (ATTENTION, "(SPLIT ? partial_start : row_start)", "row_start"),
    (ATTENTION, "floats[1] * mlxpage::LOG2_E * tanh(scores[i])", "mlxpage::LOG2_E * tanh(scores[i])"),
    (ATTENTION, "if (num_queries <= 0) {", "if (num_queries <= 0 && simd_group > 0) {"),
    (ATTENTION, "APPEND ? min(run_end, context - 1) : run_end;", "run_end;"),
    (ATTENTION, "APPEND && run_end == context && simd_group == SIMD_GROUPS - 1;", "APPEND && simd_group == 0;"),
    (ATTENTION, "APPEND && run_end == context && simd_group == SIMD_GROUPS - 1;", "APPEND && run_end == context;"),
    (ATTENTION, "if (key_group == 0 && first_query == 0) {", "if (first_query == 0) {"),
    (ATTENTION, "if (key_group == 0 && first_query == 0) {", "if (key_group == 0) {"),
    (ATTENTION, "if (begin < end) {", "if (true) {"),
    (ATTENTION, "long(row_start) * KV_HEADS + kv_head;", "long(sequence) * KV_HEADS;"),
    (ATTENTION, "const int offset = (context - 1) % BLOCK_SIZE;", "const int offset = context % BLOCK_SIZE;"),
    (ATTENTION, "const long block = table[(context - 1) / BLOCK_SIZE];", "const long block = table[context / BLOCK_SIZE];"),
    (ATTENTION, "mlxpage::store(new_v, (device uint*)v_pool + head * V_HEAD, offset, lane);", ""),
    (ATTENTION, "largest = i == own_query ? score : largest;", "largest = score;"),
    (ATTENTION, "largest = floats[1] * mlxpage::LOG2_E * tanh(largest);", ""),
    (ATTENTION, "total = lane % QUERY_LANES < COPIES ? 1.0f : 0.0f;", "total = 1.0f;"),
    (ATTENTION, "sums[i][j] = values[j];", "sums[i][j] = 0.0f;"),
    (ATTENTION, "score += simd_shuffle_xor(score, ushort(mask));", ""),
    (COMMON, "store_words(head + offset * ROW + part * (WIDTH * BITS / 32), share.words[piece]);", "store_words(head + offset * ROW + lane * (WIDTH * BITS / 32), share.words[piece]);"),
    (MERGE, "const long stride = long(rows) * HEADS;", "const long stride = HEADS;"),
    (MERGE, "run < runs; run++", "run + 1 < runs; run++"),
    (MERGE, "fast::exp2(stats[at] - largest) * stats[at + 1]", "stats[at + 1]"),
    (MERGE, "if (element < V_DIM) {", "if (element <= V_DIM) {"),
    (WRITE, "fence[index] = 1;", ""),
    (WRITE, "const int offset = slot % BLOCK_SIZE;", "const int offset = slot % BLOCK_SIZE + 1;"),
    (WRITE, "(device uint*)v_pool + to * V_HEAD;", "(device uint*)v_pool + to * K_HEAD;"),
    (WRITE, "const int kv_head = index / PIECES % KV_HEADS;", "const int kv_head = index / PIECES % (KV_HEADS + 1);"),
    (GATHER, "const int column = exists ? position / BLOCK_SIZE : 0;", "const int column = position / BLOCK_SIZE + 1;"),
    (GATHER, "if (sequence >= ints[2]) {", "if (sequence > ints[2]) {"),
    (COPY, "const long from = source * V_PIECES + piece - K_PIECES;", "const long from = source * K_PIECES + piece - K_PIECES;"),
    (COPY, "if (copy >= ints[0]) {", "if (copy > ints[0]) {"),
    (COMMON, "words[3] = v.w;", "words[3] = v.z;"),
    (COMMON, "to[0] = as_type<float>(word << 16);", "to[0] = as_type<float>(word << 15);"),
    (COMMON, "load_words(words + next * ROW, share.words[piece]);", "load_words(words + next * ROW + 1, share.words[piece]);"),
    (COMMON, "(offset * SIDES + part * WIDTH / GROUP);", "(offset * SIDES);"),
    (COMMON, "(offset * SIDES + part * WIDTH / GROUP);", "(part * WIDTH / GROUP);"),
    (COMMON, "word >> i * BITS / 8 * 8", "word >> i * BITS"),
    (COMMON, "float(1u << (24 - i * BITS % 8))", "float(1u << 24)"),
    (COMMON, "share.sides[piece] = sides[", "share.sides[0] = sides["),
    (COMMON, "high = max(high, element);", ""),
    (COMMON, "for (int i = 1; i < GROUP; i++) {", "for (int i = 1; i < GROUP - 1; i++) {"),
    (COMMON, "return uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;", "return uint(as_type<ushort>(high)) | uint(as_type<ushort>(low)) << 16;"),
    (COMMON, "min(max(rint(code), 0.0f), MOST)", "min(max(code, 0.0f), MOST)"),
    (COMMON, "min(max(rint(code), 0.0f), MOST)", "max(rint(code), 0.0f)"),
    (COMMON, "+ offset * (DIM / GROUP);", "+ offset;"),
    (COMMON, "for (int word = 0; word < GROUP * BITS / 32; word++) {", "for (int word = 0; word < GROUP * BITS / 32 - 1; word++) {"),
    (COMMON, "if (exists) {", "if (true) {"),
    (ATTENTION, "query_sums[query][piece] * by[piece].y", "query_sums[0][piece] * by[piece].y"),
    (ATTENTION, "query_sums[i][piece] += queries[i][piece * K_WIDTH + j];", "query_sums[i][piece] += queries[i][j];"),
    (ATTENTION, "added[i][piece] *= of_query;", ""),
    (ATTENTION, "sum + added[i][j / V_WIDTH]", "sum + added[i][0]"),
    (ATTENTION, "by[piece] = mlxpage::factors<KV>(values[i].sides[piece]);", "by[piece] = mlxpage::factors<KV>(values[i].sides[0]);"),
    (ATTENTION, "values[i].sides[piece] = 0;", ""),
    (ATTENTION, "step + key_group * KEYS + i >= end", "step + key_group * KEYS + i > end"),
    (ATTENTION, "K_CODES ? i : min(i, end - 1 - next_key)", "i"),
    (ATTENTION, "queries[i][piece * K_WIDTH + j] *= mlxpage::unit<K_BITS>(j);", "queries[i][piece * K_WIDTH + j] *= mlxpage::unit<K_BITS>(0);"),
    (ATTENTION, "sums[i][j] * mlxpage::unit<V_BITS>(j)", "sums[i][j] * mlxpage::unit<V_BITS>(0)"),
    (ATTENTION, "TURNED ? i ^ own_query : i", "i"),
    (ATTENTION, "!(TURNED && mask >= QUERY_LANES)", "!TURNED"),
    (ATTENTION, "new_largest = max(new_largest, scores[i]);", ""),
    (LATENT, "if (first_query >= HEADS) {", "if (first_query > HEADS) {"),
    (LATENT, "step + own_key + i < end ?", "step + own_key + i <= end ?"),
    (LATENT, "float(q_v[query * V_DIM + element]) * mlxpage::LOG2_E;", "float(q_v[query * V_DIM + element]) * scale;"),
    (LATENT, "sum += queries_v[j][e] * elements_v[e];", ""),
    (LATENT, "sum += queries_v[j][e] * elements_v[e];", "sum += queries_v[0][e] * elements_v[e];"),
    (LATENT, "int next_key = min(begin + key_group * KEYS, last_rows);", "int next_key = begin + key_group * KEYS;"),
    (LATENT, "next_key = min(next_key + STEP, last_rows);\nnext_block = table[next_key / BLOCK_SIZE];\n}", "next_key = min(next_key + STEP, last_rows);\n}"),
    (LATENT, "total *= factor;", ""),
    (LATENT, "sums[i][j] *= of_query;", ""),
    (LATENT, "if (simd_any(step_largest > largest + MARGIN)) {", "if (step_largest > largest + MARGIN) {"),
    (LATENT, "sum += simd_shuffle_xor(sum, ushort(mask));", ""),
    (LATENT, "for (int mask = COPIES; mask < QUERY_LANES; mask *= 2) {", "for (int mask = 1; mask < QUERY_LANES; mask *= 2) {"),
    (LATENT, "score / OWN * COPIES);", "score / OWN);"),
    (LATENT, "long(SPLIT ? partial_start : row_start) * HEADS", "long(row_start) * HEADS"),
    (LATENT, "stats[at * 2 + 1] = total;", "stats[at * 2 + 1] = all;\nstats[at * 2 + 2] = all;"),
    (LATENT, "if (simd_lane == i * QUERY_LANES) {", "if (simd_lane == 0) {"),
    (LATENT, "step < end; step += STEP", "step + STEP < end; step += STEP"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
# (sequences, options, dtypes of queries and pool, length of runs, CUDA's tiling, softcap), and bits
CASES = [
    ([(1, 1), (16, 1), (200, 1)], {"heads": (2, 3, 64, 32)}, (F32, F32), ONE_RUN, False, 0),
    ([(193, 1), (65, 2), (300, 4)], {"heads": (2, 3, 64, 80), "sinks": True}, (F32, F32), 64, False, 0),
    ([(90, 1), (50, 3)], {"heads": (1, 2, 64, 64), "window": 13}, (F16, F16), ONE_RUN, True, 0),
    ([(90, 1), (150, 2)], {"heads": (2, 1, 80, 80), "sinks": True}, (F32, BF16), ONE_RUN, True, 1.5),
    ([(70, 1), (33, 2)], {"heads": (1, 12, 128, 128), "block_size": 32}, (BF16, BF16), ONE_RUN, True, 0),
    ([(150, 1)], {"heads": (1, 1, 64, 64)}, (BF16, BF16), 48, True, 0),
    ([(193, 1), (65, 1)], {"heads": (2, 12, 64, 80), "window": 40}, (F32, F16), 32, False, 1.5),
    ([(70, 1), (33, 2)], {"heads": (2, 2, 128, 96)}, (F32, F32), ONE_RUN, False, 0, (8, 4)),
    ([(70, 1), (33, 2)], {"heads": (1, 4, 64, 128)}, (BF16, BF16), 32, True, 0, (4, 8)),
]  # fmt: skip


def check_attention() -> None:
    for sequences, options, dtypes, run, cuda, softcap, *rest in CASES:
        (bits,) = rest or [test_moving.PLAIN]
        case = paging.case(np.random.default_rng(0), sequences, *dtypes, **options)
        may_append = all(rows == 1 for _, rows in sequences)
        expected = paging.exact(paging.coded_case(case, dtypes[1], bits), softcap)
        for append in (False, True) if may_append else (False,):
            with paging.cut(run, cuda):
                cuts = {"split": run < ONE_RUN, "append": append}
                out = paging.attended(case, *dtypes, softcap=softcap, bits=bits, **cuts)
            assert paging.error(out, expected) < TOLERANCE[dtypes[0]]
    test_attention.test_attention_of_rows_that_are_appended(
        "a first row behind one that fills a block", False, None
    )
    test_attention.test_scores_of_any_size((8, 4), 30.0, ONE_RUN)


def check_moving() -> None:
    wide, narrow = ((3, 80, 96, 32), (None, None)), ((2, 16, 24, 16), (None, None))
    coded, mixed = ((2, 128, 96, 16), (8, 4)), ((2, 32, 64, 16), (None, 8))
    for dtype, shape in itertools.product((F32, BF16), (wide, narrow, coded, mixed)):
        test_moving.test_rows_land_in_their_slots_and_nowhere_else(*shape, dtype, 5, None)
        test_moving.test_a_gathered_sequence_is_in_order_and_zero_behind_its_end(
            *shape, dtype, [16, 40, 33], None
        )
        test_moving.test_copied_blocks_are_the_same_and_the_others_are_as_they_were(
            *shape, dtype, [(3, 4), (3, 5), (6, 1), (7, 12), (9, 8)], None
        )
    test_moving.test_elements_that_are_all_alike_are_kept(8, F32)


def check_latent() -> None:
    test_latent.check([1, 16, 90], (F32, F32), 8, 64, 32)
    test_latent.check([1, 33], (BF16, BF16), 20, 64, 64)
    test_latent.check([40, 100], (F16, F16), 4, 64, 32, cuda=True)
    test_latent.check([1, 40], (BF16, BF16), 4, 32, 16, cuda=True)
    test_latent.check([17, 70], (F32, F32), 3, 32, 16, run=32, cuda=True)
    test_latent.check([90, 150], (F32, BF16), 8, 64, 128, run=48, scale=30.0)


def check() -> None:
    check_moving()
    check_attention()
    check_latent()


def test_the_texts_as_they_are_pass():
    check()


def test_the_cases_run_every_line_of_every_text():
    with metal_sim.coverage() as covered:
        check()
    assert len(covered.files) == 12, "six bodies, each with a header"
    # The header is common to all, so what one of them runs is run.
    headers = {file for file in covered.files if file.endswith(".h.metal")}
    missing = covered.missing()
    by_line = Counter(line.line for line in missing if line.file in headers)
    never = [line for line in missing if line.file not in headers or by_line[line.line] == 6]
    assert not never, covered.report()


@pytest.mark.parametrize("file, old, new", MUTANTS, ids=lambda text: str(text)[:60])
def test_a_mutant_changes_one_place(file, old, new):
    assert launch._text(file).count(old) == 1
    assert old != new


def is_caught(file: str, old: str, new: str) -> bool:
    with paging.text_changed(file, old, new), contextlib.ExitStack() as stack:
        stack.enter_context(metal_sim.options(writable=("k_pool", "v_pool"), max_seconds=20))
        paging.forget()
        try:
            check()
        except (AssertionError, metal_sim.SimulatorError):
            return True
        finally:
            paging.forget()
    return False


@pytest.mark.parametrize("file, old, new", MUTANTS, ids=lambda text: str(text)[:60])
def test_a_mutant_is_caught(file, old, new):
    assert is_caught(file, old, new)
