"""What quantised K and V do to a model: perplexity and log-probabilities of real text, and bytes.

Why: half the bytes of K and V is twice the context or twice the sequences, if the model stays what
it was. How much it changes depends on the model, so this is to be run on one's own.

    python benchmarks/kv_bits.py [MODEL] [--tokens 4096] [--context 1024] [--bits 8 4 8,4 4,8]

Text is Python's own reference manual, cut into pieces of `context` tokens, each a prompt of its
own. Every token's log-probability comes from an engine whose K and V are kept in so many bits.
Chunks attend to what the pool holds, their own rows included, as a decode does. Perplexity is exp
of the mean negative log-probability; the error is that of a log-probability against the first arm,
where nothing is quantised. Bytes are of one token's K and V. The last line is JSON.
"""

import argparse
import json
import math
import time
from pydoc_data.topics import topics

import numpy as np
from about import about

from mlxpage import LLM, SamplingParams


def measure(model: str, pieces: list[list[int]], kv_bits, memory) -> tuple[np.ndarray, int, float]:
    """Log-probabilities of all tokens but the first of each piece, bytes of a token, seconds."""
    with LLM(model, kv_bits=kv_bits, memory=memory, prefix_cache=False) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(pieces, params)
        seconds = time.perf_counter() - start
        nbytes = sum(spec.bytes_per_token for spec in llm._engine.model.specs)
        found = [entry.logprob for output in outputs for entry in output.prompt_logprobs[1:]]
        return np.array(found), nbytes, seconds


def text_pieces(model: str, count: int, length: int) -> list[list[int]]:
    from mlxpage import model_store
    from mlxpage.text import Tokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = Tokenizer(model_store.resolve(model), None).encode(text)
    step = len(tokens) // count
    return [tokens[i * step : i * step + length] for i in range(count)]


def parse_bits(text: str):
    pair = [None if part == "none" else int(part) for part in text.split(",")]
    return pair[0] if len(pair) == 1 else tuple(pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096, help="in all")
    parser.add_argument("--context", type=int, default=1024, help="of a piece")
    parser.add_argument("--bits", nargs="*", default=["8", "4", "8,4", "4,8"])
    parser.add_argument("--memory")
    args = parser.parse_args()
    pieces = text_pieces(args.model, max(1, args.tokens // args.context), args.context)
    record = about("kv_bits.py") | {"model": args.model, "arms": {}}
    plain = None
    print(f"{args.model}, {len(pieces)} pieces of {args.context} tokens")
    print(f"{'K, V bits':>10} {'bytes':>8} {'perplexity':>11} {'change':>8} {'error':>8} largest")
    for name in ["none", *args.bits]:
        logprobs, nbytes, seconds = measure(args.model, pieces, parse_bits(name), args.memory)
        if plain is None:
            plain = logprobs
        perplexity, before = (math.exp(-each.mean()) for each in (logprobs, plain))
        error = np.abs(logprobs - plain)
        arm = {
            "bytes of a token": nbytes,
            "perplexity": round(perplexity, 4),
            "change %": round(100 * (perplexity / before - 1), 3),
            "mean error": round(float(error.mean()), 5),
            "largest error": round(float(error.max()), 4),
            "seconds": round(seconds, 1),
        }
        record["arms"][name] = arm
        print(
            f"{name:>10} {nbytes:>8,} {perplexity:11.4f} {arm['change %']:+7.3f}% "
            f"{arm['mean error']:8.5f} {arm['largest error']:8.4f}"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
