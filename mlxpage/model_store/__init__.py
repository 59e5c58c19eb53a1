"""From a model's name to a checked folder that mlx-lm can load; no array is touched here.

resolve(name) -> folder        a local folder, the hub's cache, the hub, a demo model from PyPI
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
from mlxpage.model_store.lookup import resolve

__all__ = [
    "DEMO_MODELS",
    "cache_dir",
    "check_adapter",
    "check_folder",
    "fingerprint",
    "generation_defaults",
    "read_config",
    "resolve",
]
