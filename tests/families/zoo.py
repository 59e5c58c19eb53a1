"""A tiny model of every family that the installed mlx-lm has, with weights that matter.

Freshly initialised models barely depend on attention and repeat one token. These have larger
queries and keys, and states that last, so that a wrong block, position, window or state changes
what they generate.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from families.configs import VARIANTS, Config, config

from mlxpage.metal.backend import mlx_lm_utils, mx

mlx_lm_utils()

CONFIGS = "tests/families/configs.py"


def _families() -> list[str]:
    """The modules of `mlx_lm.models` that hold a whole model. Importing a hundred of them takes
    seconds, and one ends the process, so their source tells."""
    folder = Path(importlib.util.find_spec("mlx_lm.models").submodule_search_locations[0])
    names = [module.name for module in pkgutil.iter_modules([str(folder)])]
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in names}

    def has(source: str, name: str) -> bool:
        return bool(re.search(rf"^(class|from .* import .*\b) *{name}\b", source, re.MULTILINE))

    return [n for n in names if has(sources[n], "Model") and has(sources[n], "ModelArgs")]


FAMILIES = _families()
CASES = sorted([*FAMILIES, *VARIANTS])

# Packages of which a family's module only wants to know that they are there.
_PROBED = {"olmo": "hf_olmo"}


def architecture(family: str) -> ModuleType:
    probed = _PROBED.get(family)
    with mock.patch.dict(sys.modules, {probed: ModuleType(probed)} if probed else {}):
        return importlib.import_module(f"mlx_lm.models.{family}")


def make(family: str, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes) -> tuple:
    """mlx-lm's own module of a family or a variant, and its config; `changes` go into that.

    Every call makes the same anew: a `Model` changes the module that it is given.
    """
    made: Config = config(family, **changes)
    code = architecture(made["model_type"])
    # Some families write into their config.
    module = code.Model(code.ModelArgs.from_dict(deepcopy(made)))
    randomise(module, seed, dtype)
    return module, made


def randomise(module, seed: int = 0, dtype: mx.Dtype = mx.float32) -> None:
    from mlx.utils import tree_flatten, tree_unflatten

    rng = np.random.default_rng(seed)
    values = [
        (name, _value(name, old, rng, dtype)) for name, old in tree_flatten(module.parameters())
    ]
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())


_QUERIES_AND_KEYS = re.compile(r"q_proj|k_proj|qkv|query_key_value|c_attn|att_proj|[qk]_b_proj")
_NORMS_OF_THEM = re.compile(r"(q|k|query|key)_?(layer)?norm\w*\.weight")
# How fast a state forgets.
_DECAYS = re.compile(r"dt_bias|dt_proj\.bias|recurrent_param|w_lora.*bias")


def _value(name: str, old: mx.array, rng, dtype: mx.Dtype) -> mx.array:
    if old.dtype == mx.uint32:  # quantised
        return mx.array(rng.integers(0, 1 << 32, old.shape, np.uint32))
    values = rng.standard_normal(old.shape)
    if _DECAYS.search(name):
        values = 0.5 * values - 3
    elif name.endswith("A_log"):
        values *= 0.3
    elif _NORMS_OF_THEM.search(name):
        values = 2 + 0.1 * values
    elif name.endswith("scales"):
        values = np.full(old.shape, 0.1)
    elif name.endswith("biases"):  # of two bits
        values = np.full(old.shape, -0.15)
    elif old.ndim >= 2:
        # Embeddings as well: larger than what layers add to them, a tied head would repeat them.
        values *= (2 if _QUERIES_AND_KEYS.search(name) else 1) / np.sqrt(old.shape[-1])
    elif name.endswith("bias") or name.endswith("sinks"):
        values *= 0.3
    else:
        values = 1 + 0.1 * values
    return mx.array(values.astype(np.float32)).astype(dtype)
