"""xattn: which attention should this model have?

``xattn.train(overrides)`` trains a run, ``xattn.load(run)`` opens a finished run's folder, and
``xattn.load_study(study)`` reads a study's runs as tables. ``xattn.main()`` executes a command line that can choose
whatever your script gave to ``xattn.register_…``. ``xattn.backend`` holds the attention functions, ``xattn.errors``
the errors of all these, and ``xattn.testing`` the checks for an activation of your own. Importing xattn imports no jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.app import main as main
    from xattn.backend.activations import register_activation as register_activation
    from xattn.data.config import register_task as register_task
    from xattn.evaluation.config import register_probe as register_probe
    from xattn.model.config import register_output_norm as register_output_norm
    from xattn.notebook import train as train
    from xattn.report.frames import LoadedStudy as LoadedStudy, load_study as load_study
    from xattn.runs.loaded_run import LoadedRun as LoadedRun, load as load
    from xattn.training.optimizers import register_optimizer as register_optimizer

__version__ = "0.1.0"

# Public name → its module, which is imported when the name is first used.
_HOMES = {
    "LoadedRun": "xattn.runs.loaded_run",
    "LoadedStudy": "xattn.report.frames",
    "load": "xattn.runs.loaded_run",
    "load_study": "xattn.report.frames",
    "main": "xattn.app",
    "register_activation": "xattn.backend.activations",
    "register_optimizer": "xattn.training.optimizers",
    "register_output_norm": "xattn.model.config",
    "register_probe": "xattn.evaluation.config",
    "register_task": "xattn.data.config",
    "train": "xattn.notebook",
}
_MODULES = ("backend", "errors", "testing")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"xattn.{name}")
    raise AttributeError(f"module 'xattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, whichever submodules have been imported."""
    return sorted([*_HOMES, *_MODULES, "__doc__", "__version__"])
