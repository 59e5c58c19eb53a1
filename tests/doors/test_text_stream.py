"""The text of a generation, token by token, of every kind of tokenizer that mlx-lm streams."""

import shutil

import pytest
import tiny_folder as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Tokenizers

from mlxpage.errors import InvalidModel, InvalidRequest
from mlxpage.text import Tokenizer

REPLACEMENT = "\ufffd"
BYTE = tiny.BYTE

# mlx-lm's byte-level detokenizer shows byte 0 as a letter, and no half surrogate is a character.
characters = st.characters(exclude_characters="\x00" + REPLACEMENT, exclude_categories=["Cs"])
texts = st.text(st.one_of(st.sampled_from("ab \n,.é日本🙂"), characters), max_size=30)
specials = st.sampled_from([tiny.IM_START, tiny.IM_END, tiny.RESERVED, tiny.END])
wild_ids = st.lists(st.integers(0, tiny.VOCAB - 1).filter(lambda token: token != BYTE), max_size=40)
stops = st.lists(st.text("ab \né🙂", min_size=1, max_size=4), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return Tokenizer(tiny_folder, tiny.IM_END)


def pieces(tokenizer, ids, stop=(), skip_special_tokens=True) -> tuple[list[str], bool]:
    """What each token and the end gave, and whether a stop string was found."""
    stream = tokenizer.stream(stop, skip_special_tokens)
    given = []
    for token in ids:
        given.append(stream.add(token))
        if stream.stopped:
            break
    return [*given, stream.finish()], stream.stopped


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """`text` before the stop string that is the first to be complete."""
    for end in range(len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))], True
    return text, False


def check_split_characters(tokenizer, text, data):
    ids = tiny.ids(text)
    for _ in range(data.draw(st.integers(0, 3))):
        ids.insert(data.draw(st.integers(0, len(ids))), data.draw(specials))
    given, _ = pieces(tokenizer, ids)
    assert "".join(given) == text
    assert not any(REPLACEMENT in piece for piece in given)


def check_any_tokens(tokenizer, ids):
    given, _ = pieces(tokenizer, ids)
    assert "".join(given) == tiny.text(ids).rstrip(REPLACEMENT)


def check_stop_strings(tokenizer, ids, stop):
    given, stopped = pieces(tokenizer, ids, stop)
    text = tiny.text(ids)
    assert ("".join(given), stopped) in (cut(text, stop), cut(text.rstrip(REPLACEMENT), stop))


CHECKS = {
    "split characters come whole": (check_split_characters, [texts, st.data()]),
    "any tokens give the text of their bytes": (check_any_tokens, [wild_ids]),
    "stop strings never leak": (
        check_stop_strings,
        [st.one_of(texts.map(tiny.ids), wild_ids), stops],
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_text_of_a_stream(tokenizer, check):
    run(tokenizer, check, 300)


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
def test_the_text_of_ten_thousand_streams(tokenizer, check):
    run(tokenizer, check, 10_000)


def run(tokenizer, check: str, examples: int) -> None:
    function, strategies = CHECKS[check]
    given_all = given(st.tuples(*strategies))
    settings(max_examples=examples, deadline=None)(
        given_all(lambda values: function(tokenizer, *values))
    )()


@given(st.text("abcdefgh", min_size=1))
def test_plain_letters_come_at_once(tokenizer, text):
    given, _ = pieces(tokenizer, tiny.ids(text), stop=("xyz",))
    assert given == [*text, ""]


def test_what_may_be_a_stop_string_is_held_back_until_it_is_not(tokenizer):
    given, stopped = pieces(tokenizer, tiny.ids("a</sa</s>"), stop=("</s>",))
    assert given == ["a", "", "", "", "</sa", "", "", "", "", ""]
    assert stopped


def test_the_start_of_a_stop_string_is_released_at_the_end(tokenizer):
    given, stopped = pieces(tokenizer, tiny.ids("ab</s"), stop=("</s>",))
    assert given == ["a", "b", "", "", "", "</s"]
    assert not stopped


def test_a_stop_string_that_only_the_end_completes_is_found(tokenizer):
    # A single space is held back by the byte-level detokenizer.
    given, stopped = pieces(tokenizer, tiny.ids("ab "), stop=("b ",))
    assert ("".join(given), stopped) == ("a", True)


def test_a_character_cut_by_the_end_is_left_out(tokenizer):
    given, _ = pieces(tokenizer, tiny.ids("né".encode()[:-1]))
    assert given == ["n", "", ""]


def test_invalid_bytes_are_shown_where_text_follows(tokenizer):
    given, _ = pieces(tokenizer, tiny.ids(b"a\xffb"))
    assert "".join(given) == f"a{REPLACEMENT}b"


def test_special_tokens_are_shown_when_asked_for(tokenizer):
    ids = [tiny.IM_START, *tiny.ids("x"), tiny.RESERVED, tiny.IM_END]
    given, _ = pieces(tokenizer, ids, skip_special_tokens=False)
    assert "".join(given) == "<|im_start|>x<|reserved|><|im_end|>"


def test_special_tokens_that_no_config_names_are_skipped_too(tokenizer):
    assert tokenizer.special_ids == {tiny.END, tiny.IM_START, tiny.IM_END, tiny.RESERVED}


def test_tokens_that_pad_the_models_vocabulary_give_no_text(tokenizer):
    given, _ = pieces(tokenizer, [*tiny.ids("a"), tiny.VOCAB, tiny.VOCAB + 99, *tiny.ids("b")])
    assert "".join(given) == "ab"


def test_a_generation_keeps_the_space_it_begins_with(tokenizer):
    assert "".join(pieces(tokenizer, tiny.ids(" a"))[0]) == " a"


def test_streams_of_one_tokenizer_do_not_mix(tokenizer):
    streams = [tokenizer.stream((), True) for _ in range(3)]
    texts = ["né", "日本", "🙂!"]
    given = [""] * 3
    for step in range(8):
        for index, stream in enumerate(streams):
            ids = tiny.ids(texts[index])
            given[index] += stream.add(ids[step]) if step < len(ids) else ""
    assert [text + s.finish() for text, s in zip(given, streams, strict=True)] == texts


def test_a_token_whose_letters_are_no_bytes_does_not_end_the_stream_with_an_error(
    tiny_folder, tmp_path
):
    odd = tiny.tokenizer()
    odd.add_tokens([AddedToken("日é", normalized=False)])
    folder = changed(tiny_folder, tmp_path, odd)
    given, _ = pieces(Tokenizer(folder, None), [*tiny.ids("a"), tiny.VOCAB])
    assert "".join(given).startswith("a")


# -- the other detokenizers --

SPM = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "SPM": SPM,
    "SPM that trims": [*SPM, decoders.Strip(" ", 1, 0)],
    "any other": [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")],
}


def changed(folder, where, tokenizer: Tokenizers):
    """A copy of a model folder with another tokenizer."""
    copy = shutil.copytree(folder, where / "changed")
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.fixture(scope="module", params=DECODERS)
def pieces_tokenizer(request, tiny_folder, tmp_path_factory) -> Tokenizer:
    """SentencePiece's way: pieces with a mark for a space, and single bytes."""
    words = ["▁", "a", "b", "▁a", "ab", *tiny.SPECIAL]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + index for index, word in enumerate(words)}
    made = Tokenizers(models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    made.decoder = decoders.Sequence(DECODERS[request.param])
    made.add_special_tokens([AddedToken(text, special=True) for text in tiny.SPECIAL])
    return Tokenizer(changed(tiny_folder, tmp_path_factory.mktemp("models"), made), None)


@given(texts)
@settings(max_examples=150, deadline=None)
def test_every_detokenizer_gives_the_text_and_splits_no_character(pieces_tokenizer, text):
    given, _ = pieces(pieces_tokenizer, pieces_tokenizer.encode(text))
    assert "".join(given) == text


@given(st.lists(st.integers(0, 300), max_size=40), stops)
@settings(max_examples=150, deadline=None)
def test_no_detokenizer_fails_on_any_tokens(pieces_tokenizer, ids, stop):
    given, stopped = pieces(pieces_tokenizer, ids, stop)
    assert not any(s in "".join(given) for s in stop)
    assert stopped or not cut("".join(given), stop)[1]


# -- text to tokens --


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match=r"'\\ud800' at 1 is half a character"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InvalidRequest, match="half a character"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a\udcff"}])


@pytest.mark.parametrize(
    "messages", ["Hi", None, [], {}, ["Hi"], [{"content": "Hi"}], [{"role": 1, "content": "Hi"}]]
)
def test_what_is_no_conversation_is_refused_with_an_example(tokenizer, messages):
    with pytest.raises(InvalidRequest, match='"role": "user"'):
        tokenizer.apply_chat_template(messages)


def test_what_the_template_refuses_is_told_in_one_line(tokenizer):
    with pytest.raises(InvalidRequest, match="chat template refuses the messages") as caught:
        tokenizer.apply_chat_template([{"role": "user"}])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_be_loaded_is_an_invalid_model(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer .* can't be loaded"):
        Tokenizer(folder, None)
