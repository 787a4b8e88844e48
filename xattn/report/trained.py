"""What a study's runs were trained on and with, for the top of its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from xattn.keys import show
from xattn.report.blocks import Block, Heading, Paragraph, Table
from xattn.report.design import in_order
from xattn.report.read import Run
from xattn.system.screen import counted

_VALUES = 8  # shown of one thing, at most

# What was trained: a line for each name. Its parts are words around a value of a run.
_Fact = Callable[[Run], object]
_FACTS: Mapping[str, Sequence[tuple[str, _Fact]]] = {
    "data": [
        ("{}", lambda run: " ".join(show(run.config[k]) for k in ("data.name", "data.path") if k in run.config)),
        ("the library of Python {}", lambda run: _library(run)),
        ("{} bytes", lambda run: _of_corpus(run, "bytes")),
        ("sha256 {}", lambda run: (run.provenance.get("data_sha256") or "")[:12]),
        ("as {}", lambda run: run.config.get("data.tokenizer")),
    ],
    "model": [
        ("{} parameters", lambda run: run.number("num_params")),
        ("{} layers", lambda run: run.config.get("model.num_layers")),
        ("{} heads", lambda run: run.config.get("model.num_heads")),
        ("width {}", lambda run: run.config.get("model.embedding_dim")),
    ],
    "training": [
        ("{} steps", lambda run: run.config.get("trainer.steps")),
        ("batches of {}", lambda run: run.config.get("trainer.batch_size")),
        ("context {}", lambda run: run.config.get("backend.context_length")),
        ("{} tokens seen", lambda run: run.tokens_seen),
    ],
    "optimizer": [
        ("{}", lambda run: run.config.get("optimizer.name")),
        ("learning rate {}", lambda run: run.config.get("optimizer.learning_rate")),
        ("schedule {}", lambda run: run.config.get("schedule.name")),
    ],
    "seeds": [("{}", lambda run: show(run.seed))],
    "devices": [
        ("{}", lambda run: run.provenance.get("device_kind")),
        ("{} in each run", lambda run: run.provenance.get("device_count")),
    ],
    "versions": [
        ("python {}", lambda run: run.provenance.get("versions", {}).get("python")),
        ("jax {}", lambda run: run.provenance.get("versions", {}).get("jax")),
        ("xattn {}", lambda run: run.provenance.get("versions", {}).get("xattn")),
    ],
    "begun": [("{}", lambda run: run.provenance.get("started_at", "")[:10])],
}


def _of_corpus(run: Run, key: str) -> str | int | None:
    found = run.provenance.get("corpus", {}).get(key)
    return found if isinstance(found, str | int) else None


def _library(run: Run) -> object:
    """Return the version of Python that supplied the run's corpus, if its standard library is the corpus."""
    if run.config.get("data.name") != "python_stdlib":
        return None
    return _of_corpus(run, "python") or run.provenance.get("versions", {}).get("python")


def trained(runs: Sequence[Run], judged: Sequence[Run]) -> Iterator[Block]:
    """Yield what the judged runs were trained on and with, all values if they differ, and how all runs ended."""
    ended = [run for run in judged if run.status in ("done", "diverged")] or judged
    rows = []
    for name, parts in _FACTS.items():
        texts = []
        for words, value in parts:
            values = in_order({each for run in ended if (each := value(run)) not in (None, "")})
            if values:
                texts.append(words.format(_each(values)))
        if texts:
            rows.append([name, ", ".join(texts)])
    yield Heading("What was trained")
    yield Table(["what", "value"], rows, words=["what", "value"])
    states = Counter(run.status for run in runs)
    yield Paragraph(
        f"{counted(len(runs), 'run')} ({', '.join(f'{count} {status}' for status, count in states.items())}). One seed "
        "means one initialisation and one data order in every arm, so runs are compared seed by seed."
    )


def _each(values: Sequence[object]) -> str:
    texts = [f"{each:,}" if isinstance(each, int) else show(each) for each in values]
    return " / ".join(texts) if len(texts) <= _VALUES else f"{' / '.join(texts[:_VALUES])} / … ({len(texts)} values)"
