"""``xattn compare RUN RUN…``: runs side by side, on the screen or as a table in wandb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from xattn.errors import BadInput, ExitCode
from xattn.report.compare import as_json, comparison
from xattn.report.read import REPORT, read_run
from xattn.runs import run_folder
from xattn.system.arguments import Parser
from xattn.tracking.display import Screen


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn compare", description="Compare runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    goes_to = parser.add_mutually_exclusive_group()
    goes_to.add_argument("--wandb", action="store_true", help="log the same table to the first run's wandb project")
    goes_to.add_argument("--json", action="store_true", help="print the table as JSON (docs/agents.md)")
    asked = parser.parse_args(argv)
    runs = [read_run(folder) for folder in _runs(asked.runs)]
    if asked.json:
        print(run_folder.to_json(as_json(runs), indent=2, ascii_only=True))
        return ExitCode.DONE
    columns, rows = comparison(runs)
    _show(columns, rows)
    if asked.wandb:
        _to_wandb(asked.runs[0], columns, rows)
    return ExitCode.DONE


def _runs(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders as typed, without the report folder and files that ``outputs/study/*`` also matches."""
    others = {folder for folder in folders if folder.is_file() or folder.absolute().name == REPORT}
    runs = [folder for folder in folders if folder not in others or (folder / run_folder.CONFIG).is_file()]
    if not runs:
        raise BadInput(f"{' '.join(map(str, folders))}: no run found")
    return runs


def distinct_parts(names: Sequence[str]) -> list[str]:
    """Shorten folder names: drop the words that all share, and the hash too if the rest still differs."""
    words = [name.split("-") for name in names]
    shared = set.intersection(*map(set, words))
    rest = [[word for word in each if word not in shared] for each in words]
    for kept in ([each[:-1] for each in rest], rest, words):
        joined = ["-".join(each) for each in kept]
        if len({*joined}) == len(names) and all(joined):
            return joined
    return [*names]


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the table. On a narrow terminal, shorten the run names, then split it into tables of the runs that fit."""
    screen, begin = Screen(), 1
    if not screen.fits(_on_screen(columns, rows)):
        columns = [columns[0], *distinct_parts(columns[1:])]
    while begin < len(columns):
        end = len(columns)
        while end > begin + 1 and not screen.fits(_on_screen(*_part(columns, rows, begin, end))):
            end -= 1
        if begin > 1:
            screen.say("")
        screen.print_table(_on_screen(*_part(columns, rows, begin, end)), folds=True)
        begin = end


def _part(
    columns: Sequence[str], rows: Sequence[Sequence[str]], begin: int, end: int
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    return [columns[0], *columns[begin:end]], [[row[0], *row[begin:end]] for row in rows]


def _on_screen(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _to_wandb(first: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Log the table in the mode of the first run's config and WANDB_MODE; offline, it goes to its study's report/."""
    import xattn.config
    from xattn.tracking.own_runs import OwnRun, log_table
    from xattn.tracking.wandb import resolve_mode

    config = xattn.config.load(first / run_folder.CONFIG)
    mode = resolve_mode(config.tracking.wandb)
    if mode == "disabled":
        raise BadInput(f"--wandb: disabled by tracking.wandb.mode of {first}, WANDB_MODE or wandb's settings file")
    folder = first.absolute().parent / REPORT
    folder.mkdir(exist_ok=True)
    own = OwnRun(config.tracking.wandb, mode, group=config.study, beside=first.absolute())
    url = log_table(own, columns, rows, folder)
    print(f"wandb: logged as a table ({url or mode})")
