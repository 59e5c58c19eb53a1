"""mlxpage: a PagedAttention engine for Apple Silicon, in Python on MLX.

    from mlxpage import LLM, SamplingParams

    with LLM("smollm2-135m", memory="2GB") as llm:
        print(llm.generate("Water boils", SamplingParams(max_tokens=32)).text)

Importing the package is cheap: MLX and mlx-lm are imported when an `LLM` is made.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "async_engine",
    "BeamSearchParams": "sampling_params",
    "LLM": "llm",
    "EngineError": "errors",
    "Handle": "handle",
    "InvalidModel": "errors",
    "InvalidRequest": "errors",
    "MlxpageError": "errors",
    "ModelNotFound": "errors",
    "OutOfMemory": "errors",
    "QueueFull": "errors",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "StreamEvent": "outputs",
    "TimedOut": "errors",
    "TokenLogprobs": "outputs",
    "UnsupportedModel": "errors",
    "freeze_support": "child",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxpage' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mlxpage.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
