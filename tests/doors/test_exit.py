"""However a program with a model ends, it ends with its own exit code."""

import pytest

# Each ends in another way; none of them closes the model.
BEGIN = """
import resource, sys, threading
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
from mlxpage import LLM, EngineError, SamplingParams
llm = LLM(sys.argv[1], num_blocks=64)
long = SamplingParams(max_tokens=400, ignore_eos=True)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit, "another limit of open files"
"""
OF_LLM = {
    "at the end of its code": (0, "", "print(llm.generate('abc', SamplingParams(max_tokens=4)))"),
    "in the middle of a stream that is kept": (
        0,
        "",
        "stream = llm.stream('abc', long)\nnext(stream)",
    ),
    "by an exception in the middle of a stream": (
        1,
        "ValueError: mine",
        "for event in llm.stream('abc', long):\n    raise ValueError('mine')",
    ),
    "by sys.exit in the middle of a stream": (
        7,
        "",
        "for event in llm.stream('abc', long):\n    sys.exit(7)",
    ),
    "while another thread generates": (
        0,
        "",
        "def work():\n"
        "    while True:\n"
        "        llm.generate(['abc'] * 8, long)\n"
        "threading.excepthook = lambda args: None\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "next(llm.stream('abc', long))",
    ),
    "in a cycle with what the garbage collector finds last": (
        0,
        "",
        "class App: pass\n"
        "app = App(); app.llm = llm; app.me = app; app.stream = llm.stream('abc', long)\n"
        "next(app.stream); del llm",
    ),
}


ASYNC = """
import asyncio, sys, threading, time
from mlxpage import AsyncEngine, SamplingParams
engine = AsyncEngine.load(sys.argv[1], num_blocks=64)
long = SamplingParams(max_tokens=400, ignore_eos=True)

async def first(handle):
    async for event in handle:
        if type(event).__name__ == "Tokens":
            return event
"""
OF_ASYNC_ENGINE = {
    "while the model loads": (0, "", "handle = engine.submit('abc')"),
    "while the model loads, and nobody has asked": (0, "", ""),
    "with a stream that is kept": (
        0,
        "",
        "handle = engine.submit('abc', long)\nasyncio.run(first(handle))",
    ),
    "by an exception in an event loop": (
        1,
        "ValueError: mine",
        "async def app():\n"
        "    await asyncio.gather(*(first(engine.submit('abc', long)) for _ in range(4)))\n"
        "    raise ValueError('mine')\n"
        "asyncio.run(app())",
    ),
    "by sys.exit while a function listens": (
        7,
        "",
        "handle = engine.submit('abc', long, on_event=lambda event: time.sleep(0.01))\n"
        "other = engine.submit('abc', long)\n"
        "asyncio.run(first(other))\n"
        "sys.exit(7)",
    ),
    "while another thread's loop awaits": (
        0,
        "",
        "async def app():\n"
        "    while True:\n"
        "        await engine.submit('abc', long)\n"
        "threading.excepthook = lambda args: None\n"
        "threading.Thread(target=asyncio.run, args=(app(),), daemon=True).start()\n"
        "asyncio.run(first(engine.submit('abc', long)))",
    ),
}


ENDS = {way: (BEGIN, *end) for way, end in OF_LLM.items()}
ENDS |= {f"an engine for apps, {way}": (ASYNC, *end) for way, end in OF_ASYNC_ENGINE.items()}
ISOLATED = ASYNC.replace("num_blocks=64", "num_blocks=64, isolate=True")
ENDS |= {
    f"an engine in another process, {way}": (ISOLATED, *OF_ASYNC_ENGINE[way])
    for way in ("while the model loads", "by sys.exit while a function listens")
}


@pytest.mark.parametrize("way", ENDS)
def test_a_program_that_closes_nothing_ends_as_it_should(python, tiny_folder, way):
    check(python, tiny_folder, *ENDS[way])


@pytest.mark.full
@pytest.mark.parametrize("way", ENDS)
def test_and_does_so_every_time(python, tiny_folder, way):
    for _ in range(20):
        check(python, tiny_folder, *ENDS[way])


def check(python, folder, begin: str, code: int, told: str, body: str) -> None:
    ended = python(begin + body, folder)
    assert ended.returncode == code, ended.stderr
    assert told in ended.stderr
    # An error while Python ends has no exit code of its own, only this.
    assert "Exception ignored" not in ended.stderr
    assert code == 1 or ended.stderr == ""


def test_a_forked_child_is_told_that_the_engine_is_not_there(python, tiny_folder):
    ended = python(
        BEGIN
        + """
import os, warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    try:
        llm.generate([5, 6, 7])
    except EngineError as error:
        print(error, flush=True)
        os._exit(5)
    os._exit(6)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(llm.generate("abc", SamplingParams(max_tokens=4, ignore_eos=True)).token_ids))
""",
        tiny_folder,
    )
    assert ended.stdout.split("\n")[:3] == ["the engine is closed", "5", "4"], ended.stderr
