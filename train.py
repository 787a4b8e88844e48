"""Trains a causal language model on the attention of your choice: ``python train.py backend.activation=sigmoid``.

Parse, compose, run. No jax is imported before the config is valid and the run folder is known to need it.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them, and we explain them

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import xattn.config
from xattn.errors import ExitCode, XattnError
from xattn.run import run

_codes: list[ExitCode] = []


def _one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of argparse's nine lines of usage; Hydra makes its parser where nobody can reach it."""
    parser.exit(ExitCode.BAD_INPUT, f"xattn: {message}; overrides stand together, after any flag. See --help\n")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(composed: DictConfig) -> None:
    try:
        config = xattn.config.from_hydra(composed)
        folder = Path(HydraConfig.get().runtime.output_dir)
        _codes.append(run(config, folder, list(HydraConfig.get().overrides.task)))
    except XattnError as error:
        print(f"xattn: {error}", file=sys.stderr)
        _codes.append(error.exit_code)
    if _codes[-1] == ExitCode.PREEMPTED:
        sys.exit(ExitCode.PREEMPTED)  # of a sweep too


def main() -> int:
    argparse.ArgumentParser.error = _one_line  # type: ignore[assignment, method-assign]
    xattn.config.register_resolvers()
    try:
        train()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except xattn.config.COMPOSITION_ERRORS as error:
        print(f"xattn: {xattn.config.explain(error, sys.argv[1:])}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if len(_codes) <= 1:
        return _codes[0] if _codes else ExitCode.DONE
    ended_well = all(code in (ExitCode.DONE, ExitCode.DIVERGED) for code in _codes)
    return ExitCode.DONE if ended_well else ExitCode.ERROR


if __name__ == "__main__":
    sys.exit(main())
