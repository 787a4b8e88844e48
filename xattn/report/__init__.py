"""``xattn report``, ``xattn verdict`` and ``xattn compare``: what a study's run folders show, with its uncertainty.

Reads run folders only: no jax, no wandb, no network.
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Write the report of ``xattn report outputs/<study>``; return the exit code."""
    from xattn.report.command import main as report

    return report(argv)
