"""The program behind ``python train.py`` and ``xattn train``: parse, compose, run.

A user's own script that registers an activation does the same by calling :func:`main` as ``xattn.main()``. No jax is
imported until the config is valid and the run folder needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

import xattn.config
from xattn import cli
from xattn.commands.like import expanded
from xattn.config import Config
from xattn.errors import BadInput, ExitCode, XattnError, storage_error
from xattn.runs.desk import run
from xattn.runs.job import Job
from xattn.runs.run_folder import FOLDERS
from xattn.runs.same_training import answered_by
from xattn.system import entry, hosts
from xattn.system.hosts import ToldByFirst
from xattn.system.screen import abandon, say
from xattn.system.signals import interruption


def _one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print one line instead of argparse's nine lines of usage. Hydra's own parser is out of our reach."""
    parser.exit(ExitCode.BAD_INPUT, f"xattn: {message}; put all overrides together, after the flags; see --help\n")


def _resolved_hydra_cfg(src_cfg: DictConfig) -> DictConfig:
    """Return the config for ``--cfg hydra --resolve``. Hydra's function drops our keys before it resolves values that
    refer to them, and does not know the run folder."""
    cfg = src_cfg.copy()
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(Path(cfg.hydra.run.dir).absolute())
        OmegaConf.resolve(cfg)
    return _sanitized_hydra_cfg(cfg)


_sanitized_hydra_cfg = Hydra.get_sanitized_hydra_cfg


def hydra_app(codes: list[ExitCode]) -> Callable[[], None]:
    """Return the function that Hydra calls; it appends the exit code of a single run to ``codes``.

    Hydra's remote launchers pickle the inner function together with copies of everything it refers to. So it refers
    only to another function and the codes.
    """

    @hydra.main(version_base="1.3", config_path=str(xattn.config.CONF), config_name="config")
    def train(composed: DictConfig) -> ExitCode:
        codes.append(train_one(composed))
        return codes[-1]

    return train


@interruption.listening()
def train_one(composed: DictConfig) -> ExitCode:
    """Train the run of a composed config; return its exit code. Handle signals, unless they are handled already."""
    hydra_config = HydraConfig.get()
    made, typed = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    try:
        config = xattn.config.from_hydra(composed, typed)
        folder = _folder(config, made)
        is_trial = hydra_config.runtime.choices["hydra/sweeper"] == "optuna"  # the tuner needs a run for each trial
        if answered_by(Job(config, folder, answerable=not is_trial), say) is not None:
            return ExitCode.DONE
        return run(config, folder, typed, stop=lambda: interruption.requested)
    except ToldByFirst as error:
        return error.exit_code
    except XattnError as error:
        where = f"\nhydra.job.chdir = true: paths are relative to {made}" if hydra_config.job.chdir else ""
        entry.tell(f"{error}{where}")
        return error.exit_code
    except Exception:  # the outermost rim: anything that run() does not catch is our own fault
        traceback.print_exc()
        return ExitCode.ERROR


def _folder(config: Config, made: Path) -> Path:
    """Return the run's folder. Hydra has made ``made``, by the run's current name; remove it if the folder differs."""
    folder = None
    try:
        folder = xattn.config.folder_of(config, made)
    finally:
        if folder != made:
            with contextlib.suppress(OSError):  # another process may be using it
                made.rmdir()
    return folder


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line as ``python train.py`` does, and exit with its code.

    The command line can choose what the calling script has registered.

    Args:
        argv: the words after the program's name. The default is those of this process; if the first of them is an
            ``xattn`` command (``sample RUN``), that command runs instead.
    """
    entry.open_streams()
    if argv is not None:
        sys.argv[1:] = argv  # Hydra reads them from there
    elif len(sys.argv) > 1 and cli.is_command(sys.argv[1]):
        sys.exit(cli.main(sys.argv[1:]))
    _leave(_train())


def _train() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # printing a sample must not stop a run on an ASCII screen
    if sys.argv[1:] == ["--version"]:  # Hydra would print its own version
        print(f"xattn {version('xattn')}")
        return ExitCode.DONE
    if len(sys.argv) == 3 and sys.argv[1] in ("--help", "-h") and "=" not in sys.argv[2]:
        return cli.main(["explain", sys.argv[2]])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them; we explain them
    argparse.ArgumentParser.error = _one_line  # type: ignore[assignment, method-assign]
    if "--resolve" in sys.argv:
        Hydra.get_sanitized_hydra_cfg = staticmethod(_resolved_hydra_cfg)  # type: ignore[method-assign]
    xattn.config.register_resolvers()
    OmegaConf.register_new_resolver("values", _values, replace=True)
    OmegaConf.register_new_resolver("choices", _choices, replace=True)
    try:
        entry.check_working_directory()
        sys.argv[1:] = expanded(xattn.config.arguments_under_new_names(sys.argv[1:]))
        sweeps = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv[1:]))
        if sweeps and (here := hosts.place(os.environ)).count > 1:
            raise BadInput(
                f"-m: several processes ({here.set_by} = {here.count}) cannot share a sweep; start a single run with "
                f"them, or sweep with a launcher\n{here.if_alone}"
            )
        xattn.config.check_folders(sys.argv[1:])
        _refuse(sys.argv[1:], sweeps=sweeps)
        codes: list[ExitCode] = []
        with interruption.listening():
            hydra_app(codes)()
        return codes[-1] if codes else ExitCode.DONE
    except XattnError as error:
        entry.tell(error)
        return error.exit_code
    except xattn.config.COMPOSITION_ERRORS as error:
        entry.tell(xattn.config.explain(error, sys.argv[1:]))
        return ExitCode.BAD_INPUT
    except SystemExit as left:
        if left.code == 1 and any(argument.startswith(("-p", "--package")) for argument in sys.argv[1:]):
            return ExitCode.BAD_INPUT  # Hydra has printed which package does not exist
        if isinstance(left.code, str):  # a message, which Python prints on the way out
            raise
        return int(left.code or ExitCode.DONE)
    except BrokenPipeError:  # the reader of our output has left: `python train.py --help | head`
        return ExitCode.DONE
    except OSError as error:  # Hydra makes the run's folder before train() is called
        refusal = storage_error(error, Path("standard output")) or BadInput(f"{error.filename}: {error.strerror}")
        entry.tell(refusal)
        return refusal.exit_code


def _values(*, _root_: DictConfig) -> str:
    """Return the config for ``${values:}`` in ``--help``. Each $ is doubled, since Hydra looks for ``$NAME`` in it."""
    from xattn.commands.explain import annotated

    ours = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    return annotated(OmegaConf.to_yaml(ours)).replace("$", "$$")


def _choices() -> str:
    """Return the choices of each group for ``${choices:}`` in ``--help``, in lines of at most 80 columns.

    Hydra resolves the template at every start, and listing the choices takes 0.4 s: other commands get nothing.
    """
    if not any(word == "-h" or word.startswith("--he") for word in sys.argv[1:]):  # argparse takes --hel too
        return ""
    hydra_itself = GlobalHydra.instance().hydra
    assert hydra_itself is not None
    lines = hydra_itself.format_config_groups(lambda group: group.partition("/")[0] != "hydra").splitlines()
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _refuse(arguments: Sequence[str], *, sweeps: bool) -> None:
    """Raise :class:`BadInput` for arguments that Hydra would accept without effect."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in ("hydra/launcher", "hydra/sweeper") and not sweeps:
            raise BadInput(f"{argument}: applies only to a sweep and needs -m")
        if key == "hydra.output_subdir" and Path(value.strip("'\"")).parts[:1] in ((), *((name,) for name in FOLDERS)):
            raise BadInput(
                f"{argument}: is where the run keeps its own files; use another name, such as .hydra, or null"
            )
        if "=" in argument and "--hydra-help" in arguments:
            raise BadInput(f"{argument}: --hydra-help shows Hydra's own flags and takes no overrides; see --help")


def _leave(code: int) -> NoReturn:
    """Exit with the code, even if standard output is a file on a disk that is full by now."""
    try:
        sys.stdout.flush()
    except OSError as error:
        abandon(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            code = code or ExitCode.STORAGE
    hosts.leave(code)
    sys.exit(code)
