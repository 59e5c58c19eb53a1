"""The tokenizer inside a GGUF file as the files that transformers reads."""

from collections.abc import Mapping
from typing import Any

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def build_tokenizer(metadata: Mapping[str, Any]):
    """A `tokenizers.Tokenizer` with the same ids as the GGUF file's own tokenizer."""
    from tokenizers import AddedToken

    ggml = _ggml(metadata)
    tokenizer = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}[ggml["model"]](ggml)
    kinds = list(zip(ggml["tokens"], ggml["token_type"], strict=True))
    special = [token for token, kind in kinds if kind == _CONTROL]
    plain = [token for token, kind in kinds if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens by name, the context and the chat template."""
    ggml = _ggml(metadata)

    def token(key: str) -> str | None:
        return ggml["tokens"][ggml[key]] if key in ggml else None

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos_token_id"),
        "eos_token": token("eos_token_id"),
        "unk_token": token("unknown_token_id"),
        "pad_token": token("padding_token_id"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    return {key: value for key, value in config.items() if value is not None}


def _ggml(metadata: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}


def _byte_level_bpe(ggml: Mapping[str, Any]):
    """SmolLM's: every digit alone, then GPT-2's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(ggml), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece_bpe(ggml: Mapping[str, Any]):
    """Gemma's: spaces as ▁, unknown characters as bytes, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    tokens = ggml["tokens"]
    model = models.BPE(
        _vocabulary(ggml),
        _merges_by_score(ggml),
        unk_token=tokens[ggml["unknown_token_id"]],
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bos = tokens[ggml["bos_token_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, ggml["bos_token_id"])],
    )
    return tokenizer


def _vocabulary(ggml: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(ggml["tokens"])}


def _merges_by_score(ggml: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for, best first, as transformers has them."""
    mergeable = {
        token: i
        for i, (token, kind) in enumerate(zip(ggml["tokens"], ggml["token_type"], strict=True))
        if kind == _NORMAL
    }
    merges = []
    for token, i in mergeable.items():
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        cuts = [(a, b) for a, b in cuts if a in mergeable and b in mergeable]
        cuts.sort(key=lambda cut: (mergeable[cut[0]], mergeable[cut[1]]))
        merges += [(-ggml["scores"][i], cut) for cut in cuts]
    merges.sort(key=lambda merge: merge[0])
    return [cut for _, cut in merges]
