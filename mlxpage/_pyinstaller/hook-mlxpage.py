"""Read by PyInstaller for apps that import mlxpage."""

from pathlib import Path

from PyInstaller.config import CONF
from PyInstaller.utils.hooks import collect_submodules, copy_metadata

from mlxpage._pyinstaller import kernels, metallibs, openblas

# Imported by names that are put together, or by the C++ of MLX.
hiddenimports = [
    *collect_submodules("mlxpage", filter=lambda name: not name.startswith("mlxpage._")),
    *collect_submodules("mlx"),
    *collect_submodules("mlx_lm.models"),
    *collect_submodules("mlx_lm.chat_templates"),
    *collect_submodules("mlx_lm.tool_parsers"),
]
datas = [*kernels(), *metallibs(Path(CONF["workpath"], "mlxpage"))]
datas += [*copy_metadata("mlx"), *copy_metadata("mlx-lm")]  # whose versions are asked for
binaries = openblas()
