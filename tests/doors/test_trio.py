"""An AsyncEngine in trio's event loop, as in asyncio's."""

import threading

import pytest
import trio
from trouble import SECONDS, wait_until

from mlxpage import AsyncEngine, EngineError, ModelNotFound, SamplingParams
from mlxpage.events import Done, Tokens

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(params=[False, True], ids=["in process", "isolated"])
def options(request):
    return {"num_blocks": 128, "isolate": request.param}


def run(app):
    async def in_time():
        with trio.fail_after(SECONDS):
            return await app()

    return trio.run(in_time)


async def read(engine, prompt: str, into: dict) -> None:
    into[prompt] = [event async for event in engine.submit(prompt, GREEDY)]


def test_streams_and_results_come_side_by_side(tiny_folder, options):
    async def app():
        told = {}
        async with AsyncEngine.load(tiny_folder, **options) as engine:
            async with trio.open_nursery() as nursery:
                for prompt in ("abc", "abd", "xyz"):
                    nursery.start_soon(read, engine, prompt, told)
            return told, [await engine.submit(prompt, GREEDY) for prompt in told]

    told, outputs = run(app)
    assert len(told) == 3
    for events, output in zip(told.values(), outputs, strict=True):
        ids = [id for event in events if isinstance(event, Tokens) for id in event.token_ids]
        assert isinstance(events[-1], Done)
        assert ids == events[-1].output.token_ids == output.token_ids and len(ids) == 12


def test_who_gives_up_cancels_the_request(tiny_folder, options):
    async def app():
        async with AsyncEngine.load(tiny_folder, **options) as engine:
            awaited, read = engine.submit("abc", LONG), engine.submit("abd", LONG)
            with trio.move_on_after(0) as given_up:
                await awaited
            assert given_up.cancelled_caught
            with trio.CancelScope() as left:
                async for event in read:
                    if isinstance(event, Tokens):
                        left.cancel()
            assert left.cancelled_caught
            return awaited.result(SECONDS), read.result(SECONDS)

    assert [output.finish_reason for output in run(app)] == ["abort", "abort"]


def test_errors_are_raised_where_one_waits(tiny_folder, options):
    async def app():
        with pytest.raises(ModelNotFound):
            await AsyncEngine.load("/nowhere/at/all", **options)
        async with AsyncEngine.load(tiny_folder, **options) as engine:
            handle = engine.submit("abc", LONG)
        with pytest.raises(EngineError, match="closed"):
            engine.submit("abc", LONG)
        return await handle

    assert run(app).finish_reason == "abort"


def test_the_loop_goes_on_while_the_engine_closes(tiny_folder, monkeypatch):
    closing, may_close = threading.Event(), threading.Event()
    close = AsyncEngine.close

    def slow(self):
        closing.set()
        assert may_close.wait(SECONDS)
        close(self)

    async def app():
        engine = await AsyncEngine.load(tiny_folder, num_blocks=64)
        monkeypatch.setattr(AsyncEngine, "close", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.aclose)
            while not closing.is_set():
                await trio.sleep(0.001)
            may_close.set()
        return engine.state

    assert run(app) == "closed"


def test_a_cancelled_app_has_closed_its_engine(tiny_folder, options):
    async def app():
        with trio.CancelScope() as scope:
            async with AsyncEngine.load(tiny_folder, **options) as engine:
                scope.cancel()
                await trio.sleep_forever()
        return engine.state

    assert run(app) == "closed"


def test_a_loop_that_has_ended_is_woken_no_more(tiny_folder):
    with AsyncEngine.load(tiny_folder, num_blocks=64) as engine:
        handles = []

        async def app():
            handles.append(engine.submit("abc", LONG))
            with trio.move_on_after(0):  # as soon as it has to wait
                async for _ in handles[0]:
                    pass

        run(app)
        assert handles[0].result(SECONDS).finish_reason == "abort"
        assert len(engine.submit("abc", GREEDY).result(SECONDS).token_ids) == 12
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "mlxpage-awaited"])
