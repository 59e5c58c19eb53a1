"""How many blocks fit, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidRequest, OutOfMemory
from mlxpage.metal import reference
from mlxpage.metal.backend import Device, device, mx
from mlxpage.metal.layout import LayerSpec, Spec, StateArray, group_kinds
from mlxpage.metal.model import Model
from mlxpage.metal.plan import GroupKind, Plan
from mlxpage.sizes import gigabytes, in_bytes

DEFAULT_SHARE = 0.5
# Without a budget given, the pool is no larger than this many tokens for each sequence that may
# run (or one whole context), although the budget would allow more.
DEFAULT_TOKENS_PER_SEQUENCE = 1024

# States that a sequence may have: the one that it reads and the one that it writes, and as many
# checkpoints. The blocks of K and V are there for so many tokens of each at least, and as large as
# it is, or the states, which may be a thousand times as large, would take all of the pool.
_STATES_PER_SEQUENCE = 4
_TOKENS_PER_STATE = 128

# Beside a step's tokens, the room that a pool has at first: for some short sequences.
_START_TOKENS = 1024

# MLX allocates for a hundred operations ahead of the one that is computed. What that comes to was
# measured: rows of float32 logits for each sampled one, when top_p and log-probabilities are asked
# for, and for each one of a prompt; pieces of a chunk's attention, or layers of a short one; and
# on a GPU all that layers make of a step's rows, where large ones are dispatched in stretches of
# a layer or two.
_LOGIT_COPIES = 12
_PROMPT_LOGIT_COPIES = 4
_PIECES_AT_ONCE = 18
_LAYERS_AT_ONCE = 3
# Chunks update states by way of a matrix of each head, this many tokens at a time and in so many
# copies; or by way of the states of all tokens, in some families.
_STATE_PIECE = 256
_COPIES_OF_A_PIECE, _MOST_COPIES = 3, 20
_STATES_OF_EACH_TOKEN = {"jamba": 14}
# Of an element, while `mx.dequantize` makes it of a code on a CPU.
_UNPACKING_BYTES = 10
# Rows of a step whose prompt log-probabilities are asked for, beside one of each sequence.
_SCORED_ROWS = 64


def parse(memory: str | int | None, total: int) -> int:
    """Bytes of "4GB", "512MiB", "50%" of `total`, or a number of bytes.

    Raises InvalidRequest for anything else, or for more than `total`.
    """
    if memory is None:
        return int(total * DEFAULT_SHARE)
    share = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]+)?)\s*%\s*", str(memory))
    wanted = int(float(share[1]) * (total / 100)) if share else in_bytes(memory)
    if wanted is None:
        raise InvalidRequest(f"memory is {memory!r}; write it like '4GB', '512MiB' or '50%'")
    if not 0 < wanted <= total:
        raise InvalidRequest(
            f"memory is {memory!r}, {gigabytes(wanted)}; this machine has {gigabytes(total)}"
        )
    return wanted


def check_weights(folder: Path, memory: str | int | None) -> None:
    """Raises OutOfMemory if the weights alone, as stored, are more than the budget: cheaper than
    finding it out while they are loaded."""
    machine = device()
    budget = parse(memory, machine.memory)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > budget:
        raise OutOfMemory(
            f"the weights in {folder} are {gigabytes(size)}; the budget is {gigabytes(budget)} of "
            f"this machine's {gigabytes(machine.memory)}. Give it more (memory), or take a smaller "
            f"or quantised model."
        )


def plan(
    model: Model,
    *,
    memory: str | int | None = None,
    num_blocks: int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    machine: Device | None = None,
) -> Plan:
    """Sizes the pool: what the budget leaves beside the weights and one step's scratch.

    Within it the pool starts small and grows. `num_blocks` sets the size of the full-attention
    groups (or of all, if none is) for good; the budget then only has to hold it. Windowed groups
    are never larger than what `max_num_seqs` sequences can read, and there are some states for each
    of them at most. `machine` is the one to plan for; None: this one.

    Raises OutOfMemory if the budget doesn't hold the weights and a usable pool.
    """
    machine = machine or device()
    budget = parse(memory, machine.memory)
    weights = model.nbytes
    kinds = group_kinds(model.specs)
    is_fixed = num_blocks is not None
    tokens_per_state = _tokens_per_state(model)

    def blocks(wanted: int) -> list[int]:
        return [of_kind(kind, wanted) for kind in kinds]

    def of_kind(kind: GroupKind, wanted: int) -> int:
        if kind.has_states:
            return states(wanted)
        if kind.window is None:
            return wanted
        cap = _window_cap(kind.window, block_size, max_num_seqs, max_num_batched_tokens)
        return min(wanted, cap)

    def states(wanted: int) -> int:
        most = _STATES_PER_SEQUENCE * max_num_seqs
        for_tokens = most if is_fixed else wanted * block_size // tokens_per_state
        return min(max(for_tokens, _STATES_PER_SEQUENCE), most)

    def pool(wanted: int) -> int:
        return _pool_bytes(model.specs, blocks(wanted), block_size)

    def scratch(wanted: int) -> int:
        tokens = wanted * block_size
        step = _scratch(model, tokens, max_num_seqs, max_num_batched_tokens, machine.kind)
        # Every sequence of a forward has a block of its own for its state.
        step += _state_scratch(model, min(max_num_seqs, states(wanted)))
        # While a pool grows no step is computed, and one of its arrays is there twice.
        return max(step, buffer(wanted))

    def buffer(wanted: int) -> int:
        return _largest_buffer(model.specs, blocks(wanted), block_size)

    context = model.context_length or 2**20
    whole_context = -(-context // block_size)
    smallest = min(whole_context, 1 + -(-max_num_batched_tokens // block_size))
    fitting = _largest(
        lambda n: weights + scratch(n) + pool(n) <= budget and buffer(n) <= machine.max_buffer,
        2**31 // block_size,
    )
    if not is_fixed:
        # Nobody can use more than this.
        wanted = whole_context * max_num_seqs
        if memory is None:
            per_sequence = max_num_seqs * -(-DEFAULT_TOKENS_PER_SEQUENCE // block_size)
            wanted = min(wanted, max(whole_context, per_sequence))
        num_blocks = min(fitting, wanted)
    elif num_blocks < 1:
        raise InvalidRequest(f"num_blocks is {num_blocks}; it must be at least 1")
    if num_blocks > fitting or fitting < smallest:
        wanted = max(smallest, num_blocks)
        if buffer(wanted) > machine.max_buffer:
            raise OutOfMemory(
                f"a pool of {wanted:,} blocks has arrays of {gigabytes(buffer(wanted))}; this "
                f"machine allows {gigabytes(machine.max_buffer)}. Take fewer (num_blocks)."
            )
        need = weights + scratch(wanted) + pool(wanted)
        raise OutOfMemory(
            f"the weights ({gigabytes(weights)}), a step's scratch ({gigabytes(scratch(wanted))}) "
            f"and a pool of {wanted:,} blocks need {gigabytes(need)}; the budget is "
            f"{gigabytes(budget)} of this machine's {gigabytes(machine.memory)}. Give it more "
            f"(memory), take a smaller or quantised model, or lower max_num_batched_tokens or "
            f"max_num_seqs."
        )
    start = num_blocks
    if not is_fixed:
        start = -(-(max_num_batched_tokens + _START_TOKENS) // block_size)
    return Plan(
        budget,
        weights,
        scratch(num_blocks),
        pool(num_blocks),
        block_size,
        blocks(num_blocks),
        blocks(min(start, num_blocks)),
        num_blocks * block_size,
        kinds,
        is_fixed,
    )


def _largest(fits, upper: int) -> int:
    """The largest n up to `upper` that fits; 0 if none does."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _tokens_per_state(model: Model) -> int:
    state = sum(sum(spec.block_nbytes(1)) for spec in model.state_specs)
    of_token = sum(spec.bytes_per_token for spec in model.kv_specs if spec.window is None)
    return max(_TOKENS_PER_STATE, state // of_token if of_token else 0)


def _window_cap(
    window: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> int:
    """Blocks that `max_num_seqs` sequences hold at most: a window each, cut by a block at both
    ends, and the rows of one step."""
    each = -(-window // block_size) + 2
    return max_num_seqs * each + -(-max_num_batched_tokens // block_size)


def _pool_bytes(specs: list[Spec], num_blocks: list[int], block_size: int) -> int:
    return sum(_array_bytes(specs, num_blocks, block_size))


def _largest_buffer(specs: list[Spec], num_blocks: list[int], block_size: int) -> int:
    return max(_array_bytes(specs, num_blocks, block_size))


def _array_bytes(specs: list[Spec], num_blocks: list[int], block_size: int) -> Iterator[int]:
    """Of each array of the pool."""
    # One more than the blocks that are handed out: NULL_BLOCK has its place too.
    lengths = dict(zip(group_kinds(specs), (count + 1 for count in num_blocks), strict=True))
    return (
        lengths[spec.group] * nbytes for spec in specs for nbytes in spec.block_nbytes(block_size)
    )


def _gathered_bytes(spec: LayerSpec, kind: str) -> int:
    """Of a position: K and V as they were, and on a CPU what 16 bits become there, and the codes of
    one of them on their way. Those of latent attention become one."""
    plain = spec.quantised(None, None).bytes_per_token * (2 if spec.may_be_latent else 1)
    if kind != "cpu":
        return plain
    codes = max(part.head_dim if part.bits else 0 for part in (spec.k, spec.v))
    wide = 0 if spec.dtype == mx.float32 else 4 * (spec.k_head_dim + spec.v_head_dim)
    return plain + spec.kv_heads * (codes * _UNPACKING_BYTES + wide)


def _first(config: dict[str, Any], *names: str) -> int:
    """What is stated under the first of the `names` by which families call it; 0 if under none."""
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _scratch(
    model: Model, tokens: int, max_num_seqs: int, max_num_batched_tokens: int, kind: str
) -> int:
    """An upper estimate of what one step allocates beside weights and a pool of `tokens`, on a
    device of this kind. (On CUDA, small steps of large models may be ahead by more: docs/log.md.)

    Activations of a few operations in a row, logits with the copies that sampling makes of them,
    and for one layer the scores of a chunk and the K and V that are gathered.
    """
    config = model.config | (model.config.get("text_config") or {})
    hidden = _first(config, "hidden_size", "hidden_dim", "n_embd", "d_model") or 4096
    widths = config.get("intermediate_size") or 0  # of each layer, in some families
    inner = max((array.shape[-1] for array in _state_arrays(model)), default=0)
    wide = max(*(widths if isinstance(widths, list) else [int(widths)]), 4 * hidden, 2 * inner)
    heads = _first(config, "num_attention_heads", "num_heads", "n_head", "n_heads") or 32
    rows = max_num_batched_tokens
    context = min(model.context_length or 2**17, tokens)

    size = max(spec.dtype.size for spec in model.specs)
    activations = rows * (4 * hidden + 3 * wide) * size
    if kind != "cpu":
        activations *= _LAYERS_AT_ONCE
    logit_rows = _LOGIT_COPIES * max_num_seqs
    logit_rows += _PROMPT_LOGIT_COPIES * (_SCORED_ROWS + max_num_seqs)
    if not model.gathers_rows:
        logit_rows += rows
    logits = logit_rows * model.vocab_size * 4
    scores = heads * rows * context * _LAYERS_AT_ONCE
    layer = max((_gathered_bytes(spec, kind) for spec in model.kv_specs), default=0)
    gathered = layer * (_LAYERS_AT_ONCE * context + min(tokens, max_num_seqs * context))
    if model.fetches:  # it makes K and V of all heads of them, and the scores of a whole chunk
        own = (int(config.get(name) or 0) for name in ("qk_nope_head_dim", "v_head_dim"))
        of_head = sum(own) or 2 * int(config.get("head_dim") or hidden // heads)
        gathered += 2 * _LAYERS_AT_ONCE * context * heads * of_head * size
    else:
        scores = min(scores, _PIECES_AT_ONCE * reference.MAX_SCORES)
    return activations + logits + max(4 * scores, _scratch_of_updates(model, rows)) + gathered


def _state_arrays(model: Model) -> list[StateArray]:
    return [array for spec in model.state_specs for array in spec.kept]


def _scratch_of_updates(model: Model, rows: int) -> int:
    """What it takes to update the states by a chunk."""
    arrays = _state_arrays(model)
    heads = max((array.shape[0] for array in arrays if len(array.shape) == 3), default=0)
    copies = min(_MOST_COPIES, (1 + -(-rows // _STATE_PIECE)) * _COPIES_OF_A_PIECE)
    of_tokens = _STATES_OF_EACH_TOKEN.get(model.family, 0) * rows
    largest = max((array.nbytes for array in arrays), default=0)
    return copies * heads * min(rows, _STATE_PIECE) ** 2 * 4 + of_tokens * largest


def _state_scratch(model: Model, num_seqs: int) -> int:
    """The states of so many sequences: those of all layers, as they were, and of some as they
    become."""
    states = [sum(spec.block_nbytes(1)) for spec in model.state_specs]
    return num_seqs * (sum(states) + _LAYERS_AT_ONCE * max(states, default=0))
