"""xattn: which attention should this model have?

``xattn.load(run)`` opens a finished run's folder, ``xattn.main()`` carries out a command line with what your script
registered, and ``xattn.backend`` holds the attention functions. Importing this package imports no jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.app import main as main
    from xattn.backend.activations import register_activation as register_activation
    from xattn.data.tasks import register_task as register_task
    from xattn.evaluation.config import register_probe as register_probe
    from xattn.loaded_run import LoadedRun as LoadedRun
    from xattn.loaded_run import load as load
    from xattn.model.config import register_output_norm as register_output_norm
    from xattn.training.optimizers import register_optimizer as register_optimizer

__version__ = "0.1.0"


_HOMES = {
    "main": "xattn.app",
    "load": "xattn.loaded_run",
    "LoadedRun": "xattn.loaded_run",
    "register_activation": "xattn.backend.activations",
    "register_output_norm": "xattn.model.config",
    "register_optimizer": "xattn.training.optimizers",
    "register_probe": "xattn.evaluation.config",
    "register_task": "xattn.data.tasks",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xattn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
