"""A whole model folder in a moment: a tiny llama, a real tokenizer of bytes, a chat template."""

import importlib
import json
from pathlib import Path

import tiny_models
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlxpage.metal.backend import mx

CONTEXT = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved|>")
END, IM_START, IM_END, RESERVED = range(4)
"""RESERVED is special to the tokenizer alone, as most of Llama 3's are: no config names it."""
BYTE = len(SPECIAL)
"""Token id of byte 0."""
WORDS = ("he", "ll", "th")
VOCAB = BYTE + 256 + len(WORDS)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": IM_END,
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make(folder: Path, seed: int = 0, **changes) -> Path:
    """Writes the folder and returns it; `changes` go into config.json."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    module = architecture.Model(architecture.ModelArgs.from_dict(config))
    tiny_models.randomise(module, seed)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    write(folder / "config.json", config)
    write(folder / "generation_config.json", {"eos_token_id": [IM_END, END]})
    tokenizer().save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        },
    )
    return folder


def tokenizer() -> Tokenizer:
    letters = byte_letters()
    vocab = {text: index for index, text in enumerate([*SPECIAL, *letters, *WORDS])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[(word[0], word[1]) for word in WORDS]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return made


def byte_letters() -> list[str]:
    """The letter by which GPT-2's byte-level alphabet writes each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def ids(text: str | bytes) -> list[int]:
    """A text as token ids of single bytes."""
    return [BYTE + byte for byte in (text.encode() if isinstance(text, str) else text)]


def text(token_ids: list[int]) -> str:
    """What token ids mean, special ones left out."""
    words = {BYTE + 256 + index: word.encode() for index, word in enumerate(WORDS)}
    pieces = [words.get(i) or bytes([i - BYTE]) for i in token_ids if i >= BYTE]
    return b"".join(pieces).decode("utf-8", "replace")


def write(file: Path, value) -> None:
    file.write_text(json.dumps(value))
