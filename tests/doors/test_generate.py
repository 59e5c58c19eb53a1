"""What `LLM.generate` and its kin give back."""

import dataclasses
import threading
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
import tiny_folder as tiny

from mlxpage import LLM, InvalidRequest, SamplingParams, engine_thread
from mlxpage.metal.backend import mlx_lm_utils, mx

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
RANDOM = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
# Nothing but letters, so that texts are easy to cut.
LETTERS = {i: -100.0 for i in range(tiny.VOCAB) if i not in set(tiny.ids("abcdefghijklmnop"))}
PLAIN = SamplingParams(temperature=0, max_tokens=20, logit_bias=LETTERS)


def changed(params: SamplingParams, **changes) -> SamplingParams:
    return dataclasses.replace(params, **changes)


def tokens(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def test_the_context_is_the_models_or_what_the_pool_can_hold(make_llm):
    assert make_llm(num_blocks=128).context_length == tiny.CONTEXT
    assert make_llm(num_blocks=8).context_length == 8 * 16


# -- prompts and params --


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm):
    one = llm.generate("abc", GREEDY)
    assert [one.token_ids, one.token_ids] == tokens(llm.generate(["abc", "abc"], GREEDY))
    assert llm.generate([], GREEDY) == []


def test_a_text_and_its_token_ids_are_the_same_prompt(llm):
    ids = llm.tokenizer.encode("hello there")
    by_text, by_ids = llm.generate(["hello there", ids], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
    assert llm.generate(ids, GREEDY).token_ids == by_ids.token_ids


def test_token_ids_may_come_as_a_tuple_or_of_numpy(llm):
    expected = llm.generate([5, 6, 7], GREEDY).token_ids
    assert llm.generate((5, 6, 7), GREEDY).token_ids == expected
    output = llm.generate(list(np.array([5, 6, 7])), GREEDY)
    assert output.token_ids == expected
    assert all(type(token) is int for token in output.prompt_token_ids)


def test_prompts_may_come_from_an_iterator(llm):
    assert len(llm.generate((text for text in ["a", "b", "c"]), GREEDY)) == 3


def test_the_callers_list_of_token_ids_stays_as_it_was(llm):
    ids = [5, 6, 7]
    llm.generate(ids, GREEDY)
    assert ids == [5, 6, 7]


def test_outputs_keep_the_order_of_the_prompts_however_long_each_takes(llm):
    lengths = [17, 1, 9, 2, 30, 5]
    params = [changed(RANDOM, max_tokens=n, seed=n) for n in lengths]
    outputs = llm.generate([f"prompt {n}" for n in lengths], params)
    assert [len(output.token_ids) for output in outputs] == lengths
    assert [tiny.text(o.prompt_token_ids) for o in outputs] == [f"prompt {n}" for n in lengths]


def test_each_prompt_has_its_own_params(llm):
    mixed = [GREEDY, changed(RANDOM, seed=1), changed(GREEDY, max_tokens=3), PLAIN]
    together = llm.generate(["abc"] * 4, mixed)
    assert tokens(together) == [llm.generate("abc", params).token_ids for params in mixed]


@pytest.mark.parametrize(
    "prompts", [None, 5, 1.5, b"abc", {"a": 1}, [None], [1.5], ["a", 5], [{"role": "user"}], [b"a"]]
)
def test_what_is_no_prompt_is_refused(llm, prompts):
    with pytest.raises(InvalidRequest, match="text"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("token", [-1, tiny.VOCAB, 10**9, "a", 1.5, None])
def test_a_token_id_that_the_model_does_not_have_is_refused(llm, token):
    with pytest.raises(InvalidRequest, match=f"0 to {tiny.VOCAB - 1}"):
        llm.generate([5, token], GREEDY)
    for name, value in ("stop_token_ids", [10**6]), ("logit_bias", {10**6: 1.0}):
        with pytest.raises(InvalidRequest, match=f"0 to {tiny.VOCAB - 1}"):
            llm.generate("a", SamplingParams(**{name: value}))


@pytest.mark.parametrize("empty", ["", [[]], ["a", ""]])
def test_an_empty_prompt_is_refused(llm, empty):
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(empty, GREEDY)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", 3, [GREEDY, None], [{}, {}]])
def test_what_are_no_params_is_refused(llm, params):
    with pytest.raises(InvalidRequest, match="SamplingParams"):
        llm.generate(["a", "b"], params)


def test_params_must_be_as_many_as_prompts(llm):
    with pytest.raises(InvalidRequest, match="3 params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY] * 3)


@pytest.mark.parametrize("priority", ["high", None, 1.5, True])
def test_a_priority_is_an_integer(llm, priority):
    with pytest.raises(InvalidRequest, match="priority"):
        llm.generate("a", GREEDY, priority=priority)


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": 5},
        {"stop": [5]},
        {"stop": {"a": 1}},
        {"stop": ""},
        {"stop": ["a"] * 33},
        {"stop_token_ids": 5},
        {"stop_token_ids": ["a"]},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {5: "a"}},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: float("nan")}},
        {"ignore_eos": "no"},
        {"skip_special_tokens": None},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_k": -1},
        {"top_k": 1.5},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"min_tokens": 5, "max_tokens": 4},
        {"seed": 2**64},
        {"logprobs": 21},
    ],
)
def test_params_that_make_no_sense_are_refused_by_name(changes):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**changes)
    assert any(name.split("_")[0] in str(caught.value) for name in changes)


def test_nothing_is_computed_unless_all_prompts_are_good(llm):
    with pytest.raises(InvalidRequest):
        llm.generate(["good", "good", ""], GREEDY)
    assert llm.stats()["steps"] == 0


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers(make_llm):
    llm = make_llm(num_blocks=64)
    with pytest.raises(InvalidRequest, match="512 tokens; the model's context of 512"):
        llm.generate([5] * 512, GREEDY)
    assert len(llm.generate([5] * 511, GREEDY).token_ids) == 1


def test_a_prompt_that_the_pool_cannot_hold_is_refused_with_numbers(make_llm):
    llm = make_llm(num_blocks=4)
    with pytest.raises(InvalidRequest, match=r"70 tokens.* 12 new.* 6 blocks .* holds 4") as caught:
        llm.generate([5] * 70, GREEDY)
    assert "num_blocks" in str(caught.value)
    # What just fits is served.
    assert len(llm.generate([5] * 52, GREEDY).token_ids) == 12


def test_without_max_tokens_the_context_ends_a_generation(llm):
    output = llm.generate([5] * 500, SamplingParams(ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (12, "length")


def test_without_max_tokens_the_pool_ends_a_generation(make_llm):
    output = make_llm(num_blocks=2).generate([5] * 20, SamplingParams(ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (12, "length")


# -- seeds --


@pytest.mark.parametrize("batches", [3, pytest.param(200, marks=pytest.mark.full)])
def test_a_seed_gives_the_same_tokens_at_every_place_of_every_batch(make_llm, batches):
    llm = make_llm(max_num_seqs=8)
    params = changed(RANDOM, seed=7)
    alone = llm.generate("abc", params).token_ids
    rng = np.random.default_rng(0)
    for place in (0, 3, 11, *rng.integers(0, 12, batches - 3)):
        prompts = [[5] * int(n) for n in rng.integers(1, 60, 12)]
        prompts[place] = "abc"
        others = [changed(RANDOM, max_tokens=int(n)) for n in rng.integers(1, 20, 12)]
        others[place] = params
        before = llm.stats()
        outputs = llm.generate(prompts, others)
        assert outputs[place].token_ids == alone
        for name, ids in ("prompt_tokens", "prompt_token_ids"), ("output_tokens", "token_ids"):
            counted = sum(len(getattr(output, ids)) for output in outputs)
            assert llm.stats()[name] - before[name] == counted


def test_another_seed_gives_other_tokens(llm):
    outputs = llm.generate(["abc"] * 4, [changed(RANDOM, seed=n) for n in (1, 2, -1, 2**64 - 1)])
    assert len(set(map(tuple, tokens(outputs[:3])))) == 3
    assert outputs[2].token_ids == outputs[3].token_ids  # the same 64 bits


def test_requests_without_a_seed_differ(llm):
    first = tokens(llm.generate(["abc"] * 3, RANDOM))
    assert len(set(map(tuple, first + tokens(llm.generate(["abc"] * 3, RANDOM))))) == 6


def test_the_seed_of_the_engine_makes_all_of_it_reproducible(make_llm):
    def run(seed):
        llm = make_llm(seed=seed)
        return tokens([*llm.generate(["a", "b"], RANDOM), llm.generate("a", RANDOM)])

    assert run(5) == run(5) != run(6)


# -- what ends a generation --


def test_the_end_token_ends_a_generation_and_is_no_text(llm):
    params = changed(PLAIN, logit_bias={tiny.IM_END: 100}, skip_special_tokens=False)
    output = llm.generate("abc", params)
    assert (output.text, output.token_ids, output.finish_reason) == ("", [tiny.IM_END], "stop")


def test_every_end_token_of_generation_config_ends_a_generation(llm):
    output = llm.generate("abc", changed(PLAIN, logit_bias={tiny.END: 100}))
    assert (output.token_ids, output.finish_reason) == ([tiny.END], "stop")


def test_min_tokens_holds_the_end_token_back(llm):
    params = changed(PLAIN, logit_bias={tiny.IM_END: 100}, min_tokens=5)
    output = llm.generate("abc", params)
    assert output.token_ids.index(tiny.IM_END) == len(output.token_ids) - 1 == 5
    assert output.finish_reason == "stop"


def test_ignore_eos_goes_on_and_special_tokens_are_shown_when_asked_for(llm):
    params = changed(PLAIN, logit_bias={tiny.IM_END: 100}, max_tokens=3, ignore_eos=True)
    output = llm.generate("abc", params)
    assert (output.text, output.token_ids) == ("", [tiny.IM_END] * 3)
    assert output.finish_reason == "length"
    shown = llm.generate("abc", changed(params, skip_special_tokens=False))
    assert shown.text == "<|im_end|>" * 3


@pytest.mark.parametrize("special", [tiny.IM_START, tiny.RESERVED])
def test_special_tokens_are_no_text_unless_asked_for(llm, special):
    params = changed(PLAIN, logit_bias={special: 100}, max_tokens=2)
    assert llm.generate("abc", params).text == ""
    shown = llm.generate("abc", changed(params, skip_special_tokens=False))
    assert shown.text == tiny.SPECIAL[special] * 2


def test_a_stop_token_ends_a_generation_and_is_no_text(llm):
    whole = llm.generate("abc", PLAIN)
    third = whole.token_ids[2]
    assert third not in whole.token_ids[:2]
    output = llm.generate("abc", changed(PLAIN, stop_token_ids=[third]))
    assert output.token_ids == whole.token_ids[:3]
    assert (output.text, output.finish_reason) == (whole.text[:2], "stop")


@pytest.mark.parametrize("begin, length", [(0, 1), (3, 1), (4, 3), (0, 5), (17, 3)])
def test_a_stop_string_is_cut_off_and_never_leaks(llm, begin, length):
    whole = llm.generate("abc", PLAIN).text
    assert len(whole) == 20
    stop = whole[begin : begin + length]
    expected = whole[: whole.index(stop)]
    events = list(llm.stream("abc", changed(PLAIN, stop=stop)))
    assert "".join(event.text for event in events) == expected == events[-1].output.text
    assert events[-1].finish_reason == "stop"
    assert len(events[-1].output.token_ids) == whole.index(stop) + length


def test_what_only_began_like_a_stop_string_is_in_the_text(llm):
    whole = llm.generate("abc", PLAIN)
    output = llm.generate("abc", changed(PLAIN, stop=whole.text[-3:] + "x"))
    assert (output.text, output.finish_reason) == (whole.text, "length")


def test_the_texts_of_all_events_make_the_whole_text(llm):
    for seed in range(3):
        params = changed(RANDOM, seed=seed, max_tokens=40, logit_bias={tiny.BYTE: -100})
        events = list(llm.stream("abc", params))
        output = events[-1].output
        assert "".join(event.text for event in events) == output.text
        assert [token for event in events for token in event.token_ids] == output.token_ids
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert output.text == tiny.text(output.token_ids).rstrip("\ufffd")
        assert output == dataclasses.replace(llm.generate("abc", params), timings=output.timings)


def test_stream_many_says_whose_event_it_is(llm):
    prompts = ["a", "bc", "def"]
    texts = [""] * 3
    for index, event in llm.stream_many(prompts, PLAIN):
        texts[index] += event.text
    assert texts == [output.text for output in llm.generate(prompts, PLAIN)]


def test_stream_takes_one_prompt(llm):
    with pytest.raises(InvalidRequest, match="one prompt"):
        llm.stream(["a", "b"])


# -- several generations of a prompt --

SEVERAL = SamplingParams(temperature=5, max_tokens=12, seed=1, ignore_eos=True, n=3)


def test_n_gives_the_further_generations_as_choices(llm):
    output = llm.generate("abc", SEVERAL)
    assert len(output.choices) == 2 and not output.choices[0].choices
    singly = [llm.generate("abc", changed(SEVERAL, n=1, seed=seed)) for seed in (1, 2, 3)]
    assert [output.text, *(choice.text for choice in output.choices)] == [o.text for o in singly]


def test_a_stream_of_several_says_which_one_an_event_is_of(llm):
    texts = [""] * 3
    for event in llm.stream("abc", SEVERAL):
        texts[event.choice] += event.text
    output = event.output
    assert texts == [output.text, *(choice.text for choice in output.choices)]


def test_a_stream_can_not_know_the_best_ones(llm):
    params = changed(SEVERAL, best_of=5)
    with pytest.raises(InvalidRequest, match="best_of is 5 and n is 3"):
        llm.stream("abc", params)
    with pytest.raises(InvalidRequest, match="best_of is 5 and n is 3"):
        llm.stream_many(["abc"], params)
    assert len(llm.generate("abc", params).choices) == 2


LONG = SamplingParams(temperature=5, max_tokens=200, seed=1, ignore_eos=True)


def test_a_stream_can_be_forked(llm):
    stream = llm.stream("abc", LONG)
    first = [next(stream) for _ in range(5)]
    same, other = stream.fork(LONG), stream.fork()
    events = [*first, *stream]
    whole = events[-1].output
    # By now it may be further than what was read of it.
    for fork in (same, other):
        *_, last = fork
        assert last.output.token_ids[:5] == whole.token_ids[:5]
        assert len(last.output.token_ids) == 200
        assert (last.output.token_ids == whole.token_ids) == (fork is same)
    with pytest.raises(InvalidRequest, match="has ended or was never added"):
        stream.fork()


def test_a_fork_that_is_dropped_ends(llm):
    stream = llm.stream("abc", LONG)
    next(stream)
    fork = stream.fork()
    del fork
    stream.close()
    assert llm.stats()["running"] == 0


def test_a_fork_that_ctrl_c_keeps_nobody_from_hearing_of_ends(llm, monkeypatch):
    stream = llm.stream("abc", LONG)
    next(stream)

    class Interrupted(Future):
        def result(self, timeout=None):
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().result(timeout)

    monkeypatch.setattr(engine_thread, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.fork()
    monkeypatch.undo()
    stream.close()
    assert llm.stats()["running"] == 0


def test_a_stream_that_has_not_begun_can_not_be_forked(llm):
    with pytest.raises(InvalidRequest, match="has ended or was never added"):
        llm.stream("abc", LONG).fork()


# -- prefixes --


def test_a_prompt_that_was_there_is_found(llm):
    prompt = list(range(50))
    llm.generate(prompt, PLAIN)
    before = llm.stats()["prefix_cache"]
    assert llm.generate(prompt, PLAIN).num_cached_tokens == 48
    after = llm.stats()["prefix_cache"]
    assert after["hit_tokens"] - before["hit_tokens"] == 48
    assert after["queried_tokens"] - before["queried_tokens"] == 50
    salted = changed(PLAIN, cache_salt="mine")
    assert llm.generate(prompt, salted).num_cached_tokens == 0
    assert llm.generate(prompt, salted).num_cached_tokens == 48


def test_without_the_cache_nothing_is_found(tiny_folder):
    with LLM(tiny_folder, prefix_cache=False) as llm:
        for _ in range(2):
            assert llm.generate(list(range(50)), PLAIN).num_cached_tokens == 0
        assert llm.stats()["prefix_cache"] is None


def test_timings_are_in_order(llm):
    timings = llm.generate("abc", PLAIN).timings
    assert timings.arrived <= timings.scheduled <= timings.first_token <= timings.finished
    assert 0 <= timings.queue_s <= timings.ttft_s <= timings.total_s


# -- chat --


def test_chat_uses_the_models_template(llm):
    reply = llm.chat([{"role": "user", "content": "Hi"}], PLAIN)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert reply.prompt_token_ids == llm.tokenizer.encode(prompt)
    assert reply.token_ids == llm.generate(prompt, PLAIN).token_ids


@pytest.mark.parametrize("messages", ["Hi", [], None, ["Hi"], [{"content": "Hi"}]])
def test_what_is_no_conversation_is_refused(llm, messages):
    with pytest.raises(InvalidRequest, match="conversation"):
        llm.chat(messages)


def test_chat_without_a_template_points_to_generate(make_llm, tiny_folder, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    tiny.write(folder / "tokenizer_config.json", config)
    llm = make_llm(folder)
    assert not llm.tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="Use generate"):
        llm.chat([{"role": "user", "content": "Hi"}])


# -- the model's own numbers --


class Dense:
    """mlx-lm's model without a cache: log-probabilities and greedy choices, in float64."""

    def __init__(self, folder):
        self.module, _ = mlx_lm_utils().load_model(folder)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self.module(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        logits = self.logits(ids)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def greedy(self, prompt: list[int], count: int, change) -> list[int]:
        """`change(logits, prompt, output)` edits the logits before each choice."""
        output: list[int] = []
        for _ in range(count):
            logits = self.logits(prompt + output)[-1]
            change(logits, prompt, output)
            output.append(int(logits.argmax()))
        return output


@pytest.fixture(scope="module")
def dense(tiny_folder):
    return Dense(tiny_folder)


PROMPT = tiny.ids("a somewhat longer prompt ") * 6
assert len(PROMPT) > 128, "longer than what is scored at once"


def test_logprobs_are_those_of_the_models_own_distribution(llm, dense):
    output = llm.generate(PROMPT, changed(RANDOM, seed=3, logprobs=5, repetition_penalty=1.5))
    expected = dense.logprobs(PROMPT + output.token_ids)[len(PROMPT) - 1 : -1]
    assert len(output.logprobs) == len(output.token_ids)
    for entry, token, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        check(entry, token, row, top=5)


def test_prompt_logprobs_are_those_of_the_models_own_distribution(llm, dense):
    output = llm.generate(PROMPT, changed(GREEDY, prompt_logprobs=3))
    expected = dense.logprobs(PROMPT)[:-1]
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert output.prompt_logprobs[0] is None
    for entry, token, row in zip(output.prompt_logprobs[1:], PROMPT[1:], expected, strict=True):
        check(entry, token, row, top=3)


def test_a_preempted_prompt_is_scored_once(make_llm):
    llm = make_llm(num_blocks=12)
    params = changed(GREEDY, max_tokens=60, prompt_logprobs=0, logprobs=0)
    prompts = [PROMPT[:70], PROMPT[3:73], PROMPT[7:77]]
    alone = [llm.generate(prompt, params) for prompt in prompts]
    assert llm.stats()["preemptions"] == 0
    together = llm.generate(prompts, params)
    assert llm.stats()["preemptions"] > 0
    for ours, expected in zip(together, alone, strict=True):
        assert ours.token_ids == expected.token_ids
        assert [entry.token_id for entry in ours.prompt_logprobs[1:]] == ours.prompt_token_ids[1:]
        assert [entry.token_id for entry in ours.logprobs] == ours.token_ids


def check(entry, token: int, row: np.ndarray, top: int) -> None:
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(row[token], abs=1e-4)
    assert [value for _, value in entry.top] == pytest.approx(sorted(row)[::-1][:top], abs=1e-4)
    for likely, value in entry.top:
        assert value == pytest.approx(row[likely], abs=1e-4)


def test_logprobs_are_there_only_when_asked_for(llm):
    plain, chosen = llm.generate(["a", "b"], [GREEDY, changed(GREEDY, logprobs=0)])
    assert plain.logprobs is None and plain.prompt_logprobs is None
    assert [entry.top for entry in chosen.logprobs] == [()] * 12


def test_requests_of_one_batch_get_as_many_logprobs_as_each_asked_for(llm):
    params = [changed(GREEDY, logprobs=n) for n in (1, 20, 4)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.logprobs[0].top) for output in outputs] == [1, 20, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": -1.5, "presence_penalty": 0.5},
        {"logit_bias": {40: 3.0, 41: -100.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 1.0, "logit_bias": {50: 2.5}},
    ],
    ids=str,
)
def test_penalties_and_biases_change_the_logits_as_documented(llm, dense, changes):
    params = changed(GREEDY, max_tokens=16, **changes)

    def change(logits, prompt, output):
        for token in {*prompt, *output}:
            factor = params.repetition_penalty or 1
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token, count in Counter(output).items():
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias

    prompt = tiny.ids("abcabc")
    expected = dense.greedy(prompt, 16, change)
    assert expected != dense.greedy(prompt, 16, lambda *_: None), "no effect to see"
    assert llm.generate(prompt, params).token_ids == expected


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_one_token_are_greedy(llm, changes):
    hot = changed(GREEDY, temperature=5.0, **changes)
    assert llm.generate("abc", hot).token_ids == llm.generate("abc", GREEDY).token_ids


def test_params_left_out_are_the_models_own(make_llm, tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tiny.write(folder / "generation_config.json", {"temperature": 5.0, "top_k": 1})
    llm = make_llm(folder)
    assert llm.defaults == {"temperature": 5.0, "top_k": 1}
    own = SamplingParams(max_tokens=12, ignore_eos=True)
    assert llm.generate("abc", own).token_ids == llm.generate("abc", GREEDY).token_ids
    free = changed(own, top_k=0, seed=1)
    assert llm.generate("abc", free).token_ids != llm.generate("abc", GREEDY).token_ids


# -- models whose numbers don't fit together --


def test_a_vocabulary_padded_beyond_the_tokenizer_is_served(make_llm, tmp_path):
    llm = make_llm(tiny.make(tmp_path / "padded", vocab_size=tiny.VOCAB + 21))
    padding = {tiny.VOCAB + 20: 100.0}
    output = llm.generate("abc", changed(PLAIN, logit_bias=padding, max_tokens=3))
    assert (output.token_ids, output.text) == ([tiny.VOCAB + 20] * 3, "")


def test_an_end_token_that_the_model_does_not_have_is_left_out(make_llm, tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tiny.write(folder / "generation_config.json", {"eos_token_id": [tiny.IM_END, 10**6]})
    llm = make_llm(folder)
    # min_tokens forbids the end tokens by their place among the logits.
    output = llm.generate("abc", changed(PLAIN, min_tokens=3, max_tokens=3))
    assert len(output.token_ids) == 3


def test_the_demo_model_answers(make_llm, smollm2_folder):
    llm = make_llm(smollm2_folder)
    reply = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0, max_tokens=24),
    )
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"
