"""Libraries that a recipe may ask for: used where they are, refused by name where they are not."""

from __future__ import annotations

import importlib
from typing import Any

from phsa_megatron.config.errors import DeviceError

_APEX = (
    "NVIDIA's apex is built from its repository with --cpp_ext --cuda_ext; the package of that name on the "
    "package index is another project (phsa-train doctor)"
)
_ENGINE = "pip install --no-build-isolation 'phsa-megatron[te]', or use an image that has it (Dockerfile)"

_WHERE = {
    "apex.optimizers": _APEX,
    "fused_weight_gradient_mlp_cuda": _APEX,
    "transformer_engine.pytorch": _ENGINE,
    "transformer_engine.pytorch.optimizers": _ENGINE,
}


def required(setting: str, module: str, name: str | None = None, instead: str = "") -> Any:
    """Return a module, or a name in it, that a setting asks for.

    Args:
        setting: as on the command line: `compute.adam=apex`.
        module: what to import.
        name: what must be in it; None returns the module.
        instead: a setting that needs no library.

    Raises:
        DeviceError: it is not installed, or the module is not what it is taken for.
    """
    try:
        found: Any = importlib.import_module(module)
        return found if name is None else getattr(found, name)
    except (ImportError, AttributeError, OSError) as error:
        what = module if name is None else f"{module}.{name}"
        raise DeviceError(
            f"{setting} asks for {what}, which cannot be used here ({type(error).__name__}: {error}). "
            f"{_WHERE[module]}. Or set {instead}"
        ) from error
