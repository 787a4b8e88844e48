"""xattn: which attention should this model have?

``xattn.load(run)`` opens a finished run's folder, ``xattn.main()`` carries out a command line with what your script
registered, and ``xattn.backend`` holds the attention functions. Importing this package imports no jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.app import main as main
    from xattn.loaded_run import LoadedRun as LoadedRun
    from xattn.loaded_run import load as load

__version__ = "0.1.0"


_HOMES = {"main": "xattn.app", "load": "xattn.loaded_run", "LoadedRun": "xattn.loaded_run"}
__all__ = ["LoadedRun", "__version__", "load", "main"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xattn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
