"""What mlxpage needs in an app that PyInstaller freezes, and isn't found by following imports.

PyInstaller learns of this folder by an entry point in pyproject.toml, and takes `hook-mlxpage.py`
in it for every app that imports mlxpage. Pairs are (file, folder in the app).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def hook_dirs() -> list[str]:
    return [str(PACKAGE / "_pyinstaller")]


def kernels() -> list[tuple[str, str]]:
    """The text of mlxpage's kernels: in the package, or beside it in a checkout."""
    folders = (PACKAGE / "metal", PACKAGE.parent / "metal")
    texts = [file for folder in folders for file in (*folder.glob("*.metal"), *folder.glob("*.h"))]
    return [(str(file), "mlxpage/metal") for file in texts]


def metallibs(links: Path) -> list[tuple[str, str]]:
    """MLX's own kernels, on macOS; `links` is a folder to work in.

    MLX looks for them beside the libmlx that was loaded, and what a frozen app loads is a link to
    that at its top. So there is a link to them at the top as well: a copy would be 150 MB more.
    PyInstaller keeps links that are relative, between files that it collects.
    """
    collected = []
    for location in find_spec("mlx").submodule_search_locations:
        for file in Path(location, "lib").glob("*.metallib"):
            inner = links / "mlx" / "lib" / file.name
            inner.parent.mkdir(parents=True, exist_ok=True)
            outer = links / file.name
            for link, target in ((inner, file), (outer, inner.relative_to(links))):
                link.unlink(missing_ok=True)
                link.symlink_to(target)
            collected += [(str(file), "mlx/lib"), (str(outer), ".")]
    return collected


def openblas() -> list[tuple[str, str]]:
    """The BLAS that makes MLX fast on a Linux CPU, if this machine has it. Not MKL: that is many
    libraries, found by names of their own."""
    from mlxpage import blas

    library = blas.load()
    return [(library, ".")] if library and "libopenblas" in Path(library).name else []
