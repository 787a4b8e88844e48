"""What ``python train.py`` does: parse, compose, run. A file of your own that registers an activation does the same by
calling :func:`main`.

No jax is imported before the config is valid and the run folder is known to need it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import xattn.config
from xattn import cli, entry, hosts
from xattn.attempt import Job
from xattn.errors import BadInput, ExitCode, XattnError, storage_error
from xattn.hosts import ToldByFirst
from xattn.run import run
from xattn.same_training import Trainings, answer, is_answerable
from xattn.signals import interruption
from xattn.sweep import study

_codes: list[ExitCode] = []  # of the run, where it is a single one


def _one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of argparse's nine lines of usage; Hydra makes its parser where nobody can reach it."""
    parser.exit(ExitCode.BAD_INPUT, f"xattn: {message}; overrides stand together, after any flag. See --help\n")


@hydra.main(version_base="1.3", config_path=str(xattn.config.CONF), config_name="config")
def train(composed: DictConfig) -> ExitCode:
    """One run, or one job of a sweep that a launcher of Hydra's carries elsewhere."""
    hydra_config = HydraConfig.get()
    made, typed = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    try:
        config = xattn.config.from_hydra(composed)
        if (folder := xattn.config.folder_of(config, made)) != made:
            with contextlib.suppress(OSError):  # Hydra has made one by the run's name of today; others may be at it
                made.rmdir()
        is_trial = hydra_config.runtime.choices["hydra/sweeper"] == "optuna"  # the tuner wants a run for each
        if _is_answered(Job(config, folder, answerable=not is_trial)):
            code = ExitCode.DONE
        else:
            code = run(config, folder, typed, stop=lambda: interruption.requested)
    except ToldByFirst as error:
        code = error.exit_code
    except XattnError as error:
        code = error.exit_code
        entry.tell(error)
    except Exception:  # the outermost rim: what run() itself does not catch is a fault of ours
        traceback.print_exc()
        code = ExitCode.ERROR
    _codes.append(code)
    return code


def _is_answered(job: Job) -> bool:
    """Whether a finished run of the same training beside the job's folder answers for it, and has been shown.

    One run over several processes is trained without a look: its model may not fit a single device to be measured on.
    """
    if hosts.place(os.environ).count > 1 or not is_answerable(job) or not (found := Trainings([job]).find(job)):
        return False
    with contextlib.suppress(OSError):  # Hydra has made it; run() makes it again where it is needed
        job.folder.rmdir()
    return answer(found, print) is not None


def main() -> NoReturn:
    """Carries out the command line, and leaves with the exit code.

    A first word that is a command of ``xattn`` (``sample RUN``) is carried out as that, with what this process has
    registered.
    """
    entry.open_streams()
    if len(sys.argv) > 1 and cli.is_command(sys.argv[1]):
        sys.exit(cli.main(sys.argv[1:]))
    _leave(_train())


def _train() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a sample of text may not stop a run on an ASCII screen
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them, and we explain them
    argparse.ArgumentParser.error = _one_line  # type: ignore[assignment, method-assign]
    xattn.config.register_resolvers()
    try:
        entry.check_working_directory()
        sweeps = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv[1:]))
        if sweeps and hosts.place(os.environ).count > 1:
            raise BadInput("-m: a sweep over several processes; start one run by them, or sweep by a launcher")
        for argument in [] if sweeps else sys.argv[1:]:
            if argument.startswith(("hydra/launcher=", "hydra/sweeper=")):
                raise BadInput(f"{argument}: is for a sweep, and needs -m")
        with interruption.listening():
            train()
    except XattnError as error:
        entry.tell(error)
        return error.exit_code
    except xattn.config.COMPOSITION_ERRORS as error:
        entry.tell(xattn.config.explain(error, sys.argv[1:]))
        return ExitCode.BAD_INPUT
    except BrokenPipeError:  # who read what we print has read enough: `python train.py --help | head`
        return ExitCode.DONE
    except OSError as error:  # Hydra makes the run's folder before train() is called
        refusal = storage_error(error, Path.cwd()) or BadInput(f"{error.filename}: {error.strerror}")
        entry.tell(refusal)
        return refusal.exit_code
    return _codes[-1] if _codes else study.exit_code()


def _leave(code: int) -> NoReturn:
    """Leaves with the code, also where the screen is a file on a disk that is full by now."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush fails again
        if not isinstance(error, BrokenPipeError):
            code = code or ExitCode.STORAGE
    hosts.part(code)
    sys.exit(code)
