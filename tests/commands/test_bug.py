"""``xattn bug RUN``: an archive that is safe to pass on, without corpus text or keys, and with its contents listed."""

from __future__ import annotations

import json
import socket
import tarfile
from pathlib import Path

import pytest

from xattn.cli import main

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, made on this host and below the home folder, with secrets in what was typed and printed."""
    run = sorted(outputs.iterdir())[-1]
    home = outputs.parent.parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    provenance = json.loads((run / "provenance.json").read_text())
    typed = f"train.py hydra.job.env_set.OPENAI_API_KEY=sk-typed1234 data.path={home}/text.txt"
    (run / "provenance.json").write_text(json.dumps(provenance | {"host": "gpu-17.lab", "command": typed}))
    text = (run.parent.parent.parent / "text.txt").read_text()
    (run / "log.txt").write_text(
        f"run folder  {run}\nwandb: https://somebody:password1@host.example/me as {KEY} on gpu-17.lab\n"
        f"\na sample at temperature 0.8:\n{text[:300]}\nresult      of nothing\n{text[300:400]}\n\n"
        f"result      val_loss 2.0000 nats/token\ndata below /srv/texts/mine.txt, on {socket.gethostname()}\n"
    )
    return run


def packed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        files = {member.name: opened.extractfile(member) for member in opened.getmembers()}
        return {name.partition("/")[2]: file.read().decode() for name, file in files.items() if file is not None}


def test_an_archive_holds_what_a_bug_needs_and_nothing_private(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert main(["bug", str(run)]) == 0
    out = capsys.readouterr().out
    archive = Path(f"xattn-bug-{run.name}.tar.gz")
    files = packed(archive)
    whole = {"config.yaml", "overrides.yaml", "provenance.json", "summary.json"}
    assert files.keys() == whole | {"log.txt", "metrics.jsonl", "now.json"}
    assert files["summary.json"] == (run / "summary.json").read_text()
    assert files["metrics.jsonl"] == (run / "metrics.jsonl").read_text()
    assert json.loads(files["now.json"])["versions"]["jax"]
    assert json.loads(files["provenance.json"])["versions"]
    everything = "\n".join(files.values())
    text = (run.parent.parent.parent / "text.txt").read_text()
    for line in text[:400].splitlines()[:8]:
        assert line not in everything
    for private in (KEY, "sk-typed1234", "password1", "gpu-17.lab", str(Path.home())):
        assert private not in everything, private
    assert "result      val_loss 2.0000" in files["log.txt"]
    assert "data.path=~/text.txt" in files["provenance.json"]
    assert socket.gethostname() not in files["log.txt"]
    for shown in (str(archive), "nothing was sent", "metrics.jsonl", "/srv/texts/mine.txt", "https://REMOVED@host"):
        assert shown in out
    assert archive.stat().st_size < 20_000
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_what_is_long_is_cut_and_what_is_damaged_is_taken_as_it_is(run: Path) -> None:
    rows = [json.dumps({"step": step, "train_loss": 1.0}) for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (run / "log.txt").write_text("a line of a log\n" * 100_000)
    (run / "provenance.json").write_bytes(b'{"host": \xff')
    (run / "summary.json").unlink()
    assert main(["bug", str(run), "--out", "here.tar.gz"]) == 0
    files = packed(Path("here.tar.gz"))
    assert files["metrics.jsonl"].splitlines() == rows[-200:]
    assert len(files["log.txt"]) == 200_000
    assert files["provenance.json"].startswith('{"host":')
    assert "summary.json" not in files


def test_mistakes_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bug", str(run.parent)]) == 2
    assert "not a run folder: it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "mine").write_text("kept")
    assert main(["bug", str(run), "--out", "mine"]) == 2
    assert "mine: already exists" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"
    assert main(["bug", str(run), "--out", "missing/a.tar.gz"]) == 2
    assert "missing/a.tar.gz: cannot be written" in capsys.readouterr().err
