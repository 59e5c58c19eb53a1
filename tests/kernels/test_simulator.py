"""The simulator finds what is wrong with a kernel, says where, and leaves a right one alone."""

from __future__ import annotations

import re
import subprocess
import sys

import metal_sim
import mlx.core as mx
import numpy as np
import pytest
from metal_sim import toolchain
from metal_sim.text import KernelText
from sample_attention import BODY, Case, line_of

pytestmark = pytest.mark.usefixtures("metal")

ORDERS = ["forward", "reverse", "shuffled"]
BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
# A place in the sample before its loop over tokens, and one after it.
BEFORE = "  float m = -3.0e38f;\n"
AFTER = "  threadgroup float sm[NSG];\n"
EXCHANGE = """\
  threadgroup float ex[NSG * 32];
  ex[sg * 32 + lane] = l;
  l += 0.0f * ex[sg * 32 + (lane ^ 1)];
"""


def run(
    source,
    inputs=None,
    outputs=None,
    *,
    grid=(64, 1, 1),
    threadgroup=(32, 1, 1),
    header="",
    template=(),
    name="k",
    **call,
):
    """Runs a kernel once. ``outputs`` are (shape, dtype) by name; else a float per thread."""
    inputs = {"x": mx.arange(64, dtype=mx.float32)} if inputs is None else inputs
    outputs = {"y": ((64,), mx.float32)} if outputs is None else outputs
    kernel = mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        atomic_outputs=call.pop("atomic_outputs", False),
    )
    return kernel(
        inputs=list(inputs.values()),
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        **call,
    )


def changed(old: str, new: str) -> str:
    assert BODY.count(old) >= 1, old
    return BODY.replace(old, new, 1)


# ---- Planted bugs -----------------------------------------------------------------------------

# What is changed in the sample: from, to, kind of the fault, and the line it is found at.
PLANTED = {
    "no barrier": (BARRIER, "", "uninitialised", "gm = max"),
    "a barrier for no memory": ("mem_threadgroup", "mem_none", "race", "gm = max"),
    "a barrier for the other memory": ("mem_threadgroup", "mem_device", "race", "gm = max"),
    "a barrier for a SIMD-group only": (
        *("threadgroup_barrier", "simdgroup_barrier"),
        *("uninitialised", "gm = max"),
    ),
    "a barrier for some SIMD-groups": (
        *(BARRIER, f"  if (sg < 4) {BARRIER}"),
        *("race", "gm = max"),
    ),
    "a barrier after a return": (
        *(AFTER, "  if (lane == 3) return;\n" + AFTER),
        *("divergence", "threadgroup_barrier"),
    ),
    "two barriers in two branches": (
        *(BARRIER, f"  if (sg & 1) {{\n{BARRIER}  }} else {BARRIER.strip()}\n"),
        *("divergence", "} else threadgroup_barrier"),
    ),
    "a simd_sum in a branch": (
        *("    s = simd_sum(s);", "    if (lane < 16) s = simd_sum(s);\n    s = simd_max(s);"),
        *("divergence", "if (lane < 16)"),
    ),
    "lanes that leave a loop early": (
        *("int t = sg;", "int t = sg + lane / 31 * NSG;"),
        *("divergence", "s = simd_sum"),
    ),
    "a wrong row of the table": ("t / PS]", "t / PS + 4]", "bounds", "const int page"),
    "a wrong page of the cache": (
        *("kcache[base + i]", "kcache[base + i + HK * PS * D]"),
        *("bounds", "s += q[i]"),
    ),
    "a threadgroup array that is too small": (
        *("so[NSG * D];", "so[NSG * D - 1];"),
        *("bounds", "so[sg * D + lane"),
    ),
    "a read behind a threadgroup array": (
        *("acc += so[j * D", "acc += so[(j + 1) * D"),
        *("bounds", "acc += so"),
    ),
    "a pointer behind a threadgroup array": (
        *("acc += so[j * D + d]", "threadgroup float* p = so + d; acc += p[NSG * D]"),
        *("bounds", "threadgroup float* p"),
    ),
    "a read behind a register array": ("s += q[i]", "s += q[i + EPT]", "bounds", "s += q[i"),
    "threadgroup memory that nobody set": (
        *("    sl[sg] = l;", "    if (sg > 0) sl[sg] = l;"),
        *("uninitialised", "gl += sl"),
    ),
    "outputs that nobody writes": ("d < D;", "d < D - 1;", "unwritten", None),
    "outputs that two threadgroups write": (
        *("out[(seq * NH + head)", "out[(seq * NH + head / 2)"),
        *("race", "out["),
    ),
    "an output read before it is written": ("= T(gl", "+= T(gl", "uninitialised", "out["),
    "a misaligned vector": (
        *(BEFORE, BEFORE + "  float2 z = *(const device float2*)(queries + 1); m += 0.0f * z.x;\n"),
        *("alignment", "float2 z"),
    ),
    "a misaligned struct": (
        BEFORE,
        BEFORE + "  struct alignas(8) P { float a, b; }; P z = *(const device P*)(queries + 1); "
        "m += 0.0f * z.a;\n",
        *("alignment", "struct alignas"),
    ),
    "a write to an input": (
        *(BEFORE, BEFORE + "  ((device T*)queries)[0] = T(0);\n"),
        *("read-only", "((device T*)queries)"),
    ),
    "too much threadgroup memory": (
        *("[NSG * D];", "[NSG * D];\n  threadgroup float big[10000];\n  big[lane] = 0.0f;"),
        *("threadgroup memory", "threadgroup float big"),
    ),
    "a register array that nobody set": ("    o[i] = 0.0f;\n", "", "uninitialised", "out["),
    "an unsigned index that wraps": ("t / PS]", "uint(t / PS - 1)]", "bounds", "const int page"),
    "a counter of several threadgroups": (
        *(BEFORE, BEFORE + "  if (lane == 0 && sg == 0) out[0] = T(1);\n"),
        *("race", "if (lane == 0 && sg == 0)"),
    ),
    "lanes that rely on lockstep": (
        *(AFTER, EXCHANGE + AFTER),
        *("uninitialised", "l += 0.0f * ex"),
    ),
    "a product that overflows": (
        *(BEFORE, BEFORE + "  int big = (n << 24) * 4096; m += 0.0f * float(big);\n"),
        *("overflow", "int big"),
    ),
    "a division by zero": (
        *(BEFORE, BEFORE + "  int none = n / (n - lens[seq]); m += 0.0f * float(none);\n"),
        *("overflow", "int none"),
    ),
    "a loop without an end": (BEFORE, BEFORE + "  while (n > 0) {}\n", "hang", "while (n"),
    "a loop of barriers without an end": (
        *(BEFORE, BEFORE + f"  while (n > -1)\n  {BARRIER}"),
        *("hang", "threadgroup_barrier"),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_at_its_line(bug):
    old, new, kind, line = PLANTED[bug]
    body = changed(old, new)
    with (
        metal_sim.options(max_seconds=0.2 if kind == "hang" else 20),
        pytest.raises(metal_sim.KernelFault) as caught,
    ):
        Case().run(body)
    assert caught.value.kind == kind, caught.value
    assert caught.value.line == (line_of(line, body) if line else 0), caught.value
    where = f"sample_attention.metal:{caught.value.line}" if line else "sample_attention.metal"
    assert str(caught.value).startswith(f"{where}: {kind}: ")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_sample_itself_is_right_in_every_order(dtype, thread_order):
    case = Case(dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    assert case.error(case.run()) < tolerance


def test_lanes_may_exchange_through_memory_with_a_barrier_between():
    barrier = "  simdgroup_barrier(mem_flags::mem_threadgroup);\n"
    lines = EXCHANGE.splitlines(keepends=True)
    body = changed(AFTER, "".join([*lines[:2], barrier, lines[2], AFTER]))
    assert Case().error(Case().run(body)) < 1e-5
    with pytest.raises(metal_sim.KernelFault, match="race: read of 'ex'"):
        Case().run(body.replace(barrier, barrier.replace("mem_threadgroup", "mem_none")))


def test_the_two_lines_of_a_race_are_both_told():
    with pytest.raises(metal_sim.KernelFault) as caught:
        Case().run(changed("mem_threadgroup", "mem_none"))
    written = f"unsynchronised with a write at sample_attention.metal:{line_of('sm[sg] = m')} by"
    assert written in str(caught.value)
    assert str(caught.value).endswith("\n    | gm = max(gm, sm[j]);")


def test_an_unchecked_run_computes_the_same_and_finds_nothing():
    checked = Case().run()
    with metal_sim.options(checked=False) as options:
        assert mx.array_equal(Case().run(), checked)
        Case().run(changed("mem_threadgroup", "mem_none"))
    assert options.runs[0].accesses == 0


def test_a_collective_in_a_helper_called_from_two_branches_diverges():
    header = "inline float total(float a) {\n  return simd_sum(a);\n}\n"
    source = """
      uint i = thread_position_in_grid.x;
      float a = x[i];
      if (i % 32 < 16) { a = total(a); } else { a = total(2.0f * a); }
      y[i] = a;
    """
    with pytest.raises(metal_sim.KernelFault, match="divergence: simd_sum is not reached"):
        run(source, header=header)
    (y,) = run(source.replace("i % 32 < 16", "i < 32"), header=header)
    assert y.tolist() == [sum(range(32))] * 32 + [2.0 * sum(range(32, 64))] * 32


def test_readers_of_another_threadgroup_race_with_a_writer():
    source = """
      uint i = thread_position_in_grid.x;
      if (i == 0) { y[0] = pool[0]; }
      threadgroup_barrier(mem_flags::mem_device);
      if (i == 40) { ((device float*)pool)[0] = 1.0f; }
    """
    pool = mx.zeros(64)
    with metal_sim.options(writable=("pool",), allow_unwritten=("y",)):
        with pytest.raises(metal_sim.KernelFault, match="race: write of 'pool' element 0"):
            run(source, {"pool": pool})
        run(source, {"pool": pool}, threadgroup=(64, 1, 1))


def test_a_barrier_of_one_simdgroup_orders_nothing_of_another():
    source = """
      threadgroup float s[32];
      uint lane = thread_index_in_simdgroup;
      if (simdgroup_index_in_threadgroup == 0) { s[lane] = x[lane]; }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      y[thread_position_in_grid.x] = simdgroup_index_in_threadgroup == FROM ? s[lane] : 0.0f;
    """
    run(source.replace("FROM", "0"), threadgroup=(64, 1, 1))
    with pytest.raises(metal_sim.KernelFault, match="race: read of 's' element 0"):
        run(source.replace("FROM", "1"), threadgroup=(64, 1, 1))


def test_an_atomic_read_does_not_hide_a_plain_one():
    source = """
      uint i = thread_position_in_grid.x;
      device atomic_int* p = (device atomic_int*)pool;
      y[i] = 0.0f;
      if (i == 0) { y[i] = float(PLAIN); }
      if (i == 1) { y[i] = float(atomic_load_explicit(p, memory_order_relaxed)); }
      if (i == 2) { atomic_store_explicit(p, 1, memory_order_relaxed); }
    """
    inputs = {"pool": mx.zeros(8, mx.int32)}
    with metal_sim.options(writable=("pool",)):
        run(source.replace("PLAIN", "0"), inputs)
        with pytest.raises(metal_sim.KernelFault, match="race: write of 'pool' element 0"):
            run(source.replace("PLAIN", "pool[0]"), inputs)


def test_an_atomic_access_races_only_with_others():
    count = "atomic_fetch_add_explicit(&y[0], 1, memory_order_relaxed);\n"
    outputs = {"y": ((1,), mx.int32)}
    call = {"atomic_outputs": True, "init_value": 0, "name": "count"}
    (y,) = run("uint i = thread_position_in_grid.x;\n" + count, {}, outputs, **call)
    assert y.item() == 64
    mixed = "if (thread_position_in_grid.x == 40) { ((device int*)y)[0] = 3; }\n"
    with pytest.raises(metal_sim.KernelFault, match=r"race: write of 'y' .* an atomic write"):
        run(count + mixed, {}, outputs, **call)


def test_a_threadgroup_has_at_most_1024_threads():
    with pytest.raises(metal_sim.KernelFault, match="1056 threads"):
        run("y[thread_position_in_grid.x] = 0;", grid=(1056, 1, 1), threadgroup=(1056, 1, 1))


# ---- Rules that need no run -------------------------------------------------------------------

PICK = "inline float pick({} a, int i) {{ return float(a[i]); }}\n"
USE = "y[i] += pick(t, 1);"
# header, statement, what is said about it; None: nothing.
STATIC = {
    "plain": ("", "y[i] += 1;", None),
    "small input, device parameter": (
        *(PICK.format("const device int*"), USE),
        r"no matching function for call to 'pick'.*\n.*k.h.metal:1: .*address space",
    ),
    "small input, templated parameter": ("template <class P> " + PICK.format("P"), USE, None),
    "device value, thread reference": (
        *("inline void inc(thread float& a) { a += 1; }\n", "inc(y[i]);"),
        r"(?s)no matching function.*address space",
    ),
    "pointer parameter": (PICK.format("const float*"), "", "explicit address space"),
    "reference parameter": ("inline float id(const float& a) { return a; }\n", "", "explicit addr"),
    "pointer variable": ("", "float* p = nullptr; y[i] += p ? 1 : 0;", "explicit address space"),
    "pointer member": ("struct S { float* p; };\n", "", "explicit address space"),
    "pointer alias": ("typedef float* P;\n", "", "explicit address space"),
    "pointer result": ("inline float* none() { return nullptr; }\n", "", "explicit address space"),
    "pointer cast": ("", "auto p = (float*)y; p[i] = 0;", "explicit address space"),
    "device member": ("struct S { device float* p; };\n", "auto p = x + i; y[i] += p[0];", None),
    "cast between address spaces": (
        *("", "threadgroup float s[4]; auto p = reinterpret_cast<device float*>(&s[0]);"),
        "reinterpret_cast from",
    ),
    "variable of the program": ("int counter = 0;\n", "", "constant address space"),
    "constant of the program": ("constant int one = 1;\n", "y[i] += one;", None),
    "double": ("", "double d = 1; y[i] += float(d);", "double"),
    "literal": ("", "y[i] += float(T(0.5 * float(T(x[i])) + 1e-3));", None),
    "float to bfloat": ("", "bfloat b = y[i]; y[i] += float(b);", "no implicit conversion"),
    "float to T": ("", "T b = y[i]; y[i] += float(b);", "no implicit conversion"),
    "int to float": ("", "y[i] += t[1];", None),
    "float to half": ("", "half h = y[i]; y[i] += float(h);", None),
    "half4 of float4": ("", "half4 h = float4(1); y[i] += float(h.x);", "cannot initialize"),
    "three of four": ("", "float4 v = float4(1, 2, 3); y[i] += v.x;", "number of components"),
    "simd_sum of long": ("", "y[i] += float(simd_sum(long(i)));", "deleted function 'simd_sum'"),
    "simd_max of bool": ("", "y[i] += float(simd_max(i > 3));", "deleted function 'simd_max'"),
    "max of float and half": ("", "y[i] = max(y[i], half(1));", "ambiguous"),
    "max of int and uint": ("", "y[i] = float(max(1, 2u));", "ambiguous"),
    "virtual": ("struct A { virtual int f() { return 1; } };\n", "", "virtual"),
    "recursion": (
        *("inline float f(int a) { return a ? f(a - 1) : 0; }\n", "y[i] += f(3);"),
        "no recursion",
    ),
    "goto": ("", "goto end; end: y[i] = 0;", "no goto"),
    "lambda": ("", "auto f = [](float a) { return a; }; y[i] += f(1);", "lambda"),
    "new": ("", "auto p = new int;", "new"),
    "exceptions": ("", "try { y[i] = 1; } catch (...) {}", "try"),
    "std": ("", "y[i] = std::max(1.0f, 2.0f);", "undeclared identifier 'std'"),
    "printf": ("", 'printf("!");', "undeclared identifier 'printf'"),
    "CUDA": ("", "__syncthreads();", "undeclared identifier '__syncthreads'"),
    "attribute": ("struct S { int a [[banana]]; };\n", "", r"unknown attribute \[\[banana\]\]"),
    "buffer index": ("struct S { device int* a [[buffer(31)]]; };\n", "", "31 buffers"),
    "threadgroup in a helper": (
        *("inline void f() { threadgroup float s[4]; s[0] = 1; }\n", ""),
        "outside of a kernel",
    ),
    "threadgroup initializer": ("", "threadgroup float s = 1;", "initializer"),
    "a name of MLX's": (
        "template <typename U> struct Limits {};\n",
        "",
        "redefinition of 'Limits'",
    ),
    "unset": ("", "float a; y[i] += a;", "uninitialized"),
    "unset if": ("", "float a; if (i > 3) a = 1; y[i] += a;", "uninitialized"),
    "constant index": ("", "float a[3] = {1, 2, 3}; y[i] += a[3];", "past the end"),
    "half to bfloat": ("", "y[i] += float(bfloat(half(1)));", "not allowed"),
    "as_type of other size": ("", "y[i] = as_type<float>(half(1));", "sizes differ"),
    "not ASCII": ("", "// \N{LATIN SMALL LETTER E WITH ACUTE}", "not ASCII"),
    "assignment to an input": ("", "x[i] = 1;", "not assignable"),
}


@pytest.mark.parametrize("rule", STATIC)
def test_text_that_is_not_metal_is_refused_at_its_line(rule):
    header, statement, message = STATIC[rule]
    source = f"uint i = thread_position_in_grid.x;\ny[i] = x[i] + float(t[0]);\n{statement}\n"
    inputs = {"x": mx.zeros(64), "t": mx.zeros(4, mx.int32)}

    def call():
        return run(source, inputs, header=header, template=[("T", mx.bfloat16)])

    if message is None:
        call()
        return
    with pytest.raises(metal_sim.StaticFault, match=message) as caught:
        call()
    found = {(one.file, one.line) for one in caught.value.messages}
    assert found & {("k.metal", 3), ("k.h.metal", 1)}, caught.value


@pytest.mark.parametrize("elements", [4, 8])
def test_inputs_below_eight_elements_are_in_the_constant_address_space(elements):
    source = "uint i = thread_position_in_grid.x;\nconst device int* p = t;\ny[i] = float(p[0]);\n"
    inputs = {"t": mx.ones(elements, mx.int32)}
    if elements < 8:
        with pytest.raises(metal_sim.StaticFault, match=r"k.metal:2: .*__constant"):
            run(source, inputs)
    else:
        assert run(source, inputs)[0].tolist() == [1.0] * 64


# ---- What kernels compute ---------------------------------------------------------------------


def test_edge_threadgroups_are_trimmed():
    names = [
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threads_per_threadgroup",
        "threadgroups_per_grid",
        "threads_per_grid",
    ]
    numbers = [
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "threads_per_simdgroup",
    ]
    lines = [f"y[24 * i + {3 * j} + c] = int({name}[c]);" for j, name in enumerate(names)]
    rest = [f"y[24 * i + {18 + j}] = int({name});" for j, name in enumerate(numbers)]
    source = "\n".join(
        [
            "uint3 g = thread_position_in_grid;",
            "uint i = (g.z * threads_per_grid.y + g.y) * threads_per_grid.x + g.x;",
            *("for (int c = 0; c < 3; ++c) {", *lines, "}", *rest, "y[24 * i + 23] = 0;"),
        ]
    )
    grid, group = (45, 3, 2), (20, 2, 1)
    (y,) = run(source, {}, {"y": ((2, 3, 45, 24), mx.int32)}, grid=grid, threadgroup=group)
    for z, row, x in [(0, 0, 0), (0, 0, 44), (1, 2, 44), (0, 2, 20), (1, 1, 39)]:
        at = (x, row, z)
        position = [a % b for a, b in zip(at, group, strict=True)]
        of = [a // b for a, b in zip(at, group, strict=True)]
        size = [min(b, c - a * b) for a, b, c in zip(of, group, grid, strict=True)]
        index = (position[2] * size[1] + position[1]) * size[0] + position[0]
        threads = size[0] * size[1] * size[2]
        expected = [*at, *position, *of, *size, *(3, 2, 2), *grid, index, index % 32, index // 32]
        assert y[z, row, x].tolist() == [*expected, (threads + 31) // 32, 32, 0]


def test_vectors_are_loaded_and_built():
    source = """
      uint i = thread_position_in_grid.x;
      half4 h = *(const device half4*)(x + 4 * i);
      float4 f = float4(h) * float4(1.0, 2.0, 3.0, 4.0);
      float2 s = f.xy + f.zw;
      y[i] = dot(f, float4(1)) + 0.0 * s.x + metal::precise::exp(0.0f) - metal::fast::exp2(0.0f);
      bits[i] = as_type<uint>(f.w) ^ as_type<uint>(half2(h.x, h.y)) ^ simd_shuffle_xor(i, 1);
    """
    x = mx.random.normal((256,)).astype(mx.float16)
    outputs = {"y": ((64,), mx.float32), "bits": ((64,), mx.uint32)}
    y, bits = run(source, {"x": x}, outputs)
    scaled = np.array(x, np.float32).reshape(64, 4) * np.array([1, 2, 3, 4], np.float32)
    pairs = np.array(x).view(np.uint32).reshape(64, 2)[:, 0]
    last = np.ascontiguousarray(scaled[:, 3]).view(np.uint32)
    assert np.allclose(np.array(y), scaled.sum(1), atol=1e-5)
    assert np.array_equal(np.array(bits), last ^ pairs ^ np.arange(64, dtype=np.uint32) ^ 1)


def test_eight_values_are_loaded_at_once_as_uint4_or_as_a_struct():
    header = "struct alignas(16) eight { bfloat16_t of[8]; };\n"
    source = """
      uint i = thread_position_in_grid.x;
      uint4 words = ((const device uint4*)x)[i];
      eight values = ((const device eight*)x)[i];
      float sum = 0.0f;
      for (int j = 0; j < 4; ++j) {
        sum += as_type<float>(words[j] << 16) + as_type<float>(words[j] & 0xffff0000u);
        sum -= float(values.of[2 * j]) + float(values.of[2 * j + 1]);
      }
      y[i] = sum + float(values.of[7]);
    """
    x = mx.random.normal((512,)).astype(mx.bfloat16)
    (y,) = run(source, {"x": x}, header=header)
    assert mx.allclose(y, x.reshape(64, 8)[:, 7].astype(mx.float32), atol=1e-5)
    # A slice is handed over where it lies, so its alignment is that of its first element.
    longer = mx.concatenate([x, x])
    sliced = longer[4:516]
    with pytest.raises(metal_sim.KernelFault, match=r"alignment: .* must be a multiple of 16"):
        run(source, {"x": sliced}, header=header)
    run(source, {"x": longer[8:520]}, header=header)


SIMD = {
    "simd_sum(a)": lambda a: np.full(32, a.sum()),
    "simd_product(1 + a / 1000)": lambda a: np.full(32, np.prod(1 + a / 1000)),
    "simd_max(a)": lambda a: np.full(32, a.max()),
    "simd_min(a)": lambda a: np.full(32, a.min()),
    "simd_shuffle(a, ushort(31 - lane))": lambda a: a[::-1],
    "simd_shuffle_xor(a, 8)": lambda a: a[np.arange(32) ^ 8],
    "simd_broadcast(a, 5)": lambda a: np.full(32, a[5]),
    "simd_broadcast_first(a)": lambda a: np.full(32, a[0]),
    "simd_shuffle_rotate_down(a, 3)": lambda a: np.roll(a, -3),
    "simd_shuffle_rotate_up(a, 3)": lambda a: np.roll(a, 3),
    "simd_shuffle_and_fill_down(a, -a, 3)": lambda a: np.append(a[3:], -a[:3]),
    "simd_shuffle_and_fill_up(a, -a, 3)": lambda a: np.append(-a[-3:], a[:-3]),
    "simd_prefix_inclusive_sum(a)": np.cumsum,
    "simd_prefix_exclusive_sum(a)": lambda a: np.cumsum(a) - a,
    "float(ulong(simd_ballot(a > 3)) % 1024)": lambda a: np.full(
        32, sum(1 << i for i in range(10) if a[i] > 3)
    ),
    "simd_any(a > 30) && !simd_all(a > 30) ? 1 : 0": lambda a: np.full(32, 1.0),
    "simd_is_first() ? a : -1": lambda a: np.where(np.arange(32) == 0, a, -1),
    "float(simd_or(uint(a)) + simd_and(uint(a)) + simd_xor(1u << uint(lane)) % 8)": lambda a: (
        np.full(32, 31.0 + 0 + 7)
    ),
}


@pytest.mark.parametrize("expression", SIMD)
def test_simd_functions_agree_with_numpy(expression):
    a = np.random.default_rng(0).permutation(32).astype(np.float32)
    source = f"uint lane = thread_position_in_grid.x;\nfloat a = x[lane];\ny[lane] = {expression};"
    outputs = {"y": ((32,), mx.float32)}
    (y,) = run(source, {"x": mx.array(a)}, outputs, grid=(32, 1, 1))
    assert np.allclose(np.array(y), SIMD[expression](a), rtol=1e-5)


def test_a_shuffle_from_a_lane_that_is_not_there_gives_nothing():
    source = "uint i = thread_position_in_grid.x;\ny[i] = simd_shuffle_down(x[i], 1) + 0 * pad[0];"
    inputs = {"x": mx.zeros(64), "pad": mx.full(8, -1, mx.int32)}
    with pytest.raises(metal_sim.KernelFault, match="'y' element 31 was computed from") as caught:
        run(source, inputs)
    assert caught.value.line == 2
    # The same bits in an input may have come from there.
    inputs["x"] = mx.full(64, 0xFFFFFFFF, mx.uint32).view(mx.float32)
    run(source, inputs)


def test_a_histogram_with_atomics_in_both_memories():
    source = """
      threadgroup atomic_int counts[16];
      uint i = thread_index_in_threadgroup;
      if (i < 16) atomic_store_explicit(&counts[i], 0, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&counts[x[thread_position_in_grid.x]], 1, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (i < 16) {
        int mine = atomic_load_explicit(&counts[i], memory_order_relaxed);
        atomic_fetch_add_explicit(&y[i], mine, memory_order_relaxed);
      }
    """
    x = mx.random.randint(0, 16, (1000,))
    (y,) = run(
        *(source, {"x": x}, {"y": ((16,), mx.int32)}),
        **{"grid": (1000, 1, 1), "threadgroup": (96, 1, 1)},
        **{"atomic_outputs": True, "init_value": 0},
    )
    assert y.tolist() == np.bincount(np.array(x), minlength=16).tolist()


def test_shapes_strides_and_scalars_are_handed_over():
    source = """
      uint i = thread_position_in_grid.x;
      y[i] = float(x_shape[1] * 1000 + int(x_strides[0]) * 10 + x_ndim) + scale;
    """
    (y,) = run(source, {"x": mx.zeros((2, 8, 4)), "scale": 0.5})
    assert y.tolist() == [8 * 1000 + 32 * 10 + 3 + 0.5] * 64


def test_inputs_that_are_not_row_contiguous_are_copied_first():
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8).T
    (y,) = run("uint i = thread_position_in_grid.x;\ny[i] = x[i];", {"x": x})
    assert mx.array_equal(y.reshape(8, 8), x)


def test_init_value_fills_outputs_that_threads_leave_alone():
    source = "uint i = thread_position_in_grid.x;\nif (i % 2) y[i] = 1;"
    (y,) = run(source, init_value=7)
    assert y.tolist() == [7.0, 1.0] * 32
    with metal_sim.options(allow_unwritten=("y",)):
        assert run(source)[0].tolist()[1::2] == [1.0] * 32


def test_orders_differ_and_are_repeatable():
    source = """
      uint i = thread_position_in_grid.x;
      ticket[i] = atomic_fetch_add_explicit((device atomic_int*)next, 1, memory_order_relaxed);
    """
    outputs = {"ticket": ((128,), mx.int32)}

    def tickets(**options):
        inputs = {"next": mx.zeros(8, mx.int32)}
        with metal_sim.options(writable=("next",), **options):
            return run(source, inputs, outputs, grid=(128, 1, 1), threadgroup=(64, 1, 1))[
                0
            ].tolist()

    assert tickets() == list(range(128))
    assert tickets(order="reverse") == list(range(127, -1, -1))
    shuffled = tickets(order="shuffled", seed=1)
    assert sorted(shuffled) == list(range(128)) != shuffled
    assert tickets(order="shuffled", seed=1) == shuffled != tickets(order="shuffled", seed=2)


# ---- Inputs that are written in place ---------------------------------------------------------

WRITE = """
  uint i = thread_position_in_grid.x;
  ((device T*)pool)[slots[i] * 2] = values[i];
  y[i] = 1.0f;
"""


@pytest.mark.parametrize(
    "dtype",
    [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint32, mx.uint8, mx.bool_],
    ids=str,
)
def test_what_a_kernel_writes_to_a_declared_input_is_in_the_array(dtype):
    pool = mx.ones((8, 16), dtype)
    values = mx.arange(64).astype(dtype)
    slots = mx.array(np.random.default_rng(0).permutation(64).astype(np.int32))
    inputs = {"pool": pool, "slots": slots, "values": values}
    expected = mx.array(np.ones((128,), np.float32)).astype(dtype)
    expected[slots * 2] = values
    with metal_sim.options(writable=("pool",)):
        run(WRITE, inputs, template=[("T", dtype)])
    assert mx.array_equal(pool.reshape(-1), expected)


def test_a_write_to_an_input_that_is_not_declared_is_a_fault():
    slots = mx.arange(64, dtype=mx.int32)
    inputs = {"pool": mx.ones(128), "slots": slots, "values": mx.zeros(64)}
    with pytest.raises(metal_sim.KernelFault, match="read-only: write to the input 'pool'"):
        run(WRITE, inputs, template=[("T", mx.float32)])
    assert mx.array_equal(inputs["pool"], mx.ones(128))


def test_two_threads_that_write_the_same_element_of_a_declared_input_race():
    slots = mx.zeros(64, mx.int32)
    inputs = {"pool": mx.ones(128), "slots": slots, "values": mx.zeros(64)}
    with (
        metal_sim.options(writable=("pool",)),
        pytest.raises(metal_sim.KernelFault, match="race: write of 'pool' element 0"),
    ):
        run(WRITE, inputs, template=[("T", mx.float32)])


def test_an_array_that_is_given_twice_is_the_same_memory_twice():
    """As a GPU has it: who reads it as the one and writes it as the other races with itself."""
    source = """
      uint i = thread_position_in_grid.x;
      ((device float*)pool)[i] = other[63 - i] + 1.0f;
      y[i] = 1.0f;
    """
    pool = mx.zeros(64)
    with metal_sim.options(writable=("pool",)):
        run(source, {"other": mx.ones(64), "pool": pool})
        assert mx.array_equal(pool, mx.full(64, 2.0))
        with pytest.raises(metal_sim.KernelFault, match=r"race: (read|write) of '(pool|other)'"):
            run(source, {"other": pool, "pool": pool})


def test_a_declared_input_that_mlx_would_copy_is_refused():
    inputs = {"pool": mx.ones((64, 2)).T, "slots": mx.zeros(64, mx.int32), "values": mx.zeros(64)}
    with (
        metal_sim.options(writable=("pool",)),
        pytest.raises(metal_sim.SimulatorError, match="isn't row-contiguous"),
    ):
        run(WRITE, inputs, template=[("T", mx.float32)])


def test_offsets_beyond_32_bits():
    # numpy's zeros are no memory before something touches them.
    pool = np.zeros((2**16 + 1, 2**16), np.uint8)
    flat = pool.reshape(-1)
    source = """
      uint i = thread_position_in_grid.x;
      y[i] = float(pool[LONG(i + 1) * 67108865]);
      ((device uint8_t*)pool)[LONG(i + 1) * 67108864] = 1;
    """
    flat[67108865 * np.arange(1, 65, dtype=np.int64)] = np.arange(64, dtype=np.uint8)
    with metal_sim.options(writable=("pool",)):
        (y,) = run(source.replace("LONG", "int64_t"), {"pool": pool})
        assert y.tolist() == list(range(64))
        assert flat[2**32] == 1
        with pytest.raises(metal_sim.KernelFault, match="overflow: 32 \\* 67108865 doesn't fit"):
            run(source.replace("LONG", "int"), {"pool": pool})


# ---- Coverage ---------------------------------------------------------------------------------

COVERED_HEADER = """\
template <int N>
inline float helper(float a) {
  if constexpr (N > 0) {
    return a + 1.0f;
  } else {
    return a - 1.0f;
  }
}
inline float unused(float a) {
  return a;
}
constexpr int size() {
  return 4;
}
"""
COVERED = """\
uint i = thread_position_in_grid.x;
float a = x[i];  // a comment
if (a < 0.0f)
  a = -a;
#pragma unroll
for (int j = 0; j < size(); ++j)
  if (j == 2) { a += 1.0f; } else if (j > 5)
    a -= 1.0f;
  else
    a += 0.5f;
if (a > 1e6f) a = 0.0f; a = helper<1>(a);
switch (i % 4) {
  case 0:
  case 1: a += 1.0f; break;
  case 7:
    a += 2.0f;
    break;
  default: break;
}
do { a += 1.0f; } while (a < 3.0f);
while (a > 1e9f) {
}
y[i] = a;
"""


def test_coverage_tells_the_lines_that_never_ran():
    x = mx.arange(64, dtype=mx.float32)
    with metal_sim.coverage() as covered:
        run(COVERED, {"x": x}, header=COVERED_HEADER, name="c")
    missing = {(line.file, line.line) for line in covered.missing()}
    lines = COVERED.split("\n")
    expected = {
        ("c.metal", number)
        for number, line in enumerate(lines, 1)
        if line.strip() in ("a = -a;", "a -= 1.0f;", "a += 2.0f;")
        or line.startswith(("if (a > 1e6f)", "while (a > 1e9f)"))
    }
    expected.add(("c.metal", lines.index("  case 7:") + 3))
    assert missing == expected | {("c.h.metal", 6), ("c.h.metal", 10)}
    assert covered.files == ["c.h.metal", "c.metal"]
    partly = next(line for line in covered.missing() if line.text.startswith("if (a > 1e6f)"))
    assert (partly.count, partly.total) == (1, 3)
    with covered:
        run(COVERED, {"x": x - 1e3}, header=COVERED_HEADER, name="c")
    assert ("c.metal", 4) not in {(line.file, line.line) for line in covered.missing()}
    assert "c.metal: " in covered.report()


def test_coverage_is_complete_when_all_ran():
    with metal_sim.coverage() as covered:
        run("uint i = thread_position_in_grid.x;\ny[i] = x[i];\n", name="all")
    assert covered.files == ["all.metal"]
    assert not covered.missing()
    assert covered.report() == "all.metal: 2 of 2 lines ran"


def test_statements_keep_their_meaning_when_they_are_counted():
    counted = run(COVERED, header=COVERED_HEADER)[0].tolist()

    def plain(i: int) -> float:
        a = float(i) + 0.5 * 3 + 1.0 + 1.0 + (i % 4 < 2) + 1.0
        while a < 3.0:
            a += 1.0
        return a

    assert counted == [plain(i) for i in range(64)]


IN_PLACE_HEADER = """\
namespace sample {
template <int N>
inline float sum(const thread float* a) {
  if constexpr (N > 0) {
    return a[N - 1] + sum<N - 1>(a);
  } else {
    return 0.0f;
  }
}
struct running_max {
  float value;
  running_max() : value(-1e30f) {
    value = max(value, 0.0f);
  }
  void add(float a) thread {
    value = metal::fast::exp2(metal::log2(max(value, a)));
  }
};
#define TWICE(x) ((x) + (x))
template <typename T>
inline void copy8(device T* to, const device T* from) {
  *(device uint4*)to = *(const device uint4*)from;
}
inline bfloat16_t round_to_bfloat(float a) {
  uint bits = as_type<uint>(a);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return as_type<bfloat16_t>(ushort(bits >> 16));
}
} // namespace sample
"""
IN_PLACE = """\
const int head = int(threadgroup_position_in_grid.x);
const int row = int(threadgroup_position_in_grid.y);
const int64_t slot = slots[row];
device T* to = (device T*)pool + (slot * H + head) * D;
const device T* from = k + (row * H + head) * D;
const uint lane = thread_position_in_threadgroup.x;
for (uint i = lane; i < D / 8; i += threads_per_threadgroup.x)
  sample::copy8(to + 8 * i, from + 8 * i);
sample::running_max largest;
largest.add(float(from[0]));
float parts[3] = {1.0f, 2.0f, TWICE(largest.value)};
if (lane == 0) fence[row * H + head] = sample::round_to_bfloat(sample::sum<3>(parts));
"""


def test_a_writer_in_place_with_helpers_of_all_kinds_runs_every_line(thread_order):
    heads, dim = 2, 64
    pool = mx.zeros((32, heads, dim), mx.bfloat16)
    k = mx.random.normal((8, heads, dim)).astype(mx.bfloat16)
    slots = mx.array([3, 31, 7, 9, 0, 13, 15, 17], mx.int32)
    with metal_sim.options(writable=("pool",)), metal_sim.coverage() as covered:
        (fence,) = run(
            IN_PLACE,
            {"pool": pool, "k": k, "slots": slots},
            {"fence": ((8, heads), mx.bfloat16)},
            grid=(heads * 32, 8, 1),
            header=IN_PLACE_HEADER,
            template=[("T", mx.bfloat16), ("H", heads), ("D", dim)],
        )
    assert mx.array_equal(pool[slots], k)
    assert mx.abs(pool).sum(axis=(1, 2)).astype(mx.bool_).sum().item() == 8
    expected = 3 + 2 * mx.maximum(k[:, :, 0].astype(mx.float32), 0)
    assert mx.allclose(fence.astype(mx.float32), expected, rtol=1e-2)
    assert len(covered.files) == 2
    assert not covered.missing(), covered.report()


def test_line_directives_name_the_file_that_people_edit():
    header = '#line 5 "real.metal"\ninline float one() { return 1.0f; }\n'
    source = (
        '#line 40 "real.metal"\nuint i = thread_position_in_grid.x;\ny[i] = x[i + 1] + one();\n'
    )
    with metal_sim.coverage() as covered, pytest.raises(metal_sim.KernelFault) as caught:
        run(source, header=header)
    assert (caught.value.file, caught.value.line) == ("real.metal", 41)
    assert covered.files == ["real.metal"]
    with pytest.raises(metal_sim.StaticFault, match=r"^real.metal:5: .*'wrong'"):
        run(source, header=header.replace("1.0f", "wrong"))


def test_lines_of_a_text_of_ones_own_are_its_own():
    text = KernelText('a\n#line 9 "b"\nc', "whole.metal")
    assert [str(text.place(line)) for line in (1, 3)] == ["whole.metal:1", "b:9"]


# ---- The tools --------------------------------------------------------------------------------


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch):
    toolchain.find.cache_clear()
    monkeypatch.delenv("METAL_SIM_CLANG", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(metal_sim.ToolchainMissing) as caught:
        toolchain.find()
    toolchain.find.cache_clear()
    assert re.search(r"-m pip install 'ziglang\S+' libclang", str(caught.value))


def test_without_libclang_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "clang.cindex", None)
    with pytest.raises(metal_sim.ToolchainMissing, match=r"-m pip install .* libclang"):
        toolchain.libclang()


def test_a_kernel_that_was_compiled_once_needs_no_compiler(monkeypatch):
    source = "uint i = thread_position_in_grid.x;\ny[i] = x[i] + 3.0f;\n"
    run(source)

    def refuse(*arguments, **keywords):
        raise AssertionError("a compiler was started")

    toolchain.find()
    monkeypatch.setattr(subprocess, "run", refuse)
    assert run(source)[0].tolist()[0] == 3.0
    with pytest.raises(AssertionError, match="a compiler was started"):
        run(source.replace("3.0f", "float(SEED)"), template=[("SEED", id(source) % 10**6)])


def test_options_are_refused_when_they_make_no_sense():
    with (
        pytest.raises(ValueError, match="choose one of forward, reverse, shuffled"),
        metal_sim.options(order="backward"),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"writable=\('pool',\)"),
        metal_sim.options(writable="pool"),
    ):
        pass


def test_a_run_tells_what_it_did():
    with metal_sim.options() as options:
        Case().run()
    (only,) = options.runs
    assert only.name == "sample_attention"
    assert "[[kernel]] void custom_kernel_sample_attention" in only.text
    assert only.threadgroup_bytes == 4 * (8 + 8 + 8 * 64)
    assert only.accesses > only.collectives > 0
