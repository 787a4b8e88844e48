"""xattn: which attention should this model have?

``xattn.load(run)`` opens a finished run's folder; ``xattn.backend`` holds the attention functions. Importing this
package imports no jax: commands that need none answer at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.loaded_run import LoadedRun as LoadedRun
    from xattn.loaded_run import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("load", "LoadedRun"):
        from xattn import loaded_run

        return getattr(loaded_run, name)
    raise AttributeError(f"module 'xattn' has no attribute {name!r}")
