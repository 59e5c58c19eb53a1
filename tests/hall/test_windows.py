"""Layers with a sliding window hold what they can read, however long a generation gets."""

import serving
from families import zoo

from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

WINDOW, LENGTH, BLOCK_SIZE = 512, 4000, 16


def test_a_long_generation_holds_its_window_and_two_blocks():
    module, config = zoo.make("gemma3_text", sliding_window=WINDOW)
    model = Model(module, config)
    engine = serving.engine(model, num_blocks=600, max_num_seqs=2, max_num_batched_tokens=64)
    windows = [group.window for group in engine.pool.groups]
    windowed, most = windows.index(WINDOW), 0
    assert sorted(windows, key=str) == [WINDOW, None]

    def watch(engine):
        nonlocal most
        tables = [seq.block_tables[windowed] for seq in engine.scheduler.running]
        held = [sum(map(bool, table)) for table in tables]
        most = max([most, *held])

    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    (output,) = serving.serve(engine, [list(range(40))], params, on_step=watch)
    assert len(output.token_ids) == LENGTH
    assert WINDOW // BLOCK_SIZE <= most <= WINDOW // BLOCK_SIZE + 2
