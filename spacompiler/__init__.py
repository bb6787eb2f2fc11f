"""spacompiler: a structured pruning compiler.

    result = spacompiler.compile(model, example_inputs, target="params=70%", importance="taylor")
    result.module          # the pruned module
    result.save("out")     # the artifact: weights, config, ONNX, plan, report, manifest

Everything is imported when it is first used, so that `import spacompiler` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
_HOMES = {"compile": "api", "inspect": "pipeline.inspected", "Result": "api", "sweep": "api",
          "diagnose": "pipeline.diagnosed",
          "load": "artifact.load", "lift": "adapters.lifting",
          "verify": "artifact.verify", "SpaError": "errors", "UsageError": "errors",
          "TargetError": "errors", "ProofError": "errors", "Pruner": "live.pruner",
          "register": "torch_backend.registered", "Recipe": "request.recipe"}
__all__ = ["ProofError", "Pruner", "Recipe", "Result", "SpaError", "TargetError", "UsageError",
           "__version__", "compile", "diagnose", "inspect", "lift", "load", "register", "sweep",
           "verify"]

if TYPE_CHECKING:
    from .adapters.lifting import lift
    from .api import Result, compile, sweep
    from .artifact.load import load
    from .artifact.verify import verify
    from .errors import ProofError, SpaError, TargetError, UsageError
    from .live.pruner import Pruner
    from .pipeline.diagnosed import diagnose
    from .pipeline.inspected import inspect
    from .request.recipe import Recipe
    from .torch_backend.registered import register


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
