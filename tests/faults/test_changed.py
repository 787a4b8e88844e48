"""What changed since the run began: another config is 2, other data are 4, a new time stamp or place is nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import xattn
import xattn.config
from xattn.data.bpe import train_bpe
from xattn.errors import BadInput
from xattn.runs.desk import run

from .harness import STEPS, TINY, Reference, differences, the_run, train

pytestmark = pytest.mark.faults

OTHER = {
    "backend.activation": "sigmoid",
    "backend.qk_pre_activation": "swish",
    "backend.theta": "500.0",
    "backend.context_length": "8",
    "backend.window": "4",
    "model.num_heads": "2",
    "model.dropout": "0.2",
    "model.embeddings": "tied",
    "data.validation_fraction": "0.2",
    "data.documents": "packed",
    "optimizer.learning_rate": "0.001",
    "optimizer.clip_norm": "null",
    "optimizer.beta2": "0.999",
    "schedule.warmup_fraction": "0.1",
    "trainer.steps": "30",
    "trainer.batch_size": "16",
    "trainer.log_every": "1",
    "trainer.eval_every": "3",
    "trainer.attention_stats_every": "5",
    "trainer.nonfinite": "skip",
    "evaluation.sequences": "16",
    "seed": "1",
}


@pytest.mark.parametrize("key", OTHER)
def test_another_value_of_a_hashed_key_is_refused_by_name(key: str, command: list[str], untouched: Path) -> None:
    config = xattn.config.compose([*command, f"{key}={OTHER[key]}"])
    with pytest.raises(BadInput, match=key):
        run(config, untouched)


@pytest.mark.parametrize("text", ["[]", '"done"', "null", "3"])
@pytest.mark.parametrize("name", ["summary.json", "provenance.json", "config.yaml"])
def test_a_file_of_another_type_is_refused_by_name(
    name: str, text: str, command: list[str], untouched: Path, tmp_path: Path
) -> None:
    """And not taken for one that is missing: the run there would be begun over."""
    shutil.copytree(untouched, folder := tmp_path / untouched.name)
    (folder / name).write_text(text)
    if name == "provenance.json":  # a finished run is shown without a look at its data
        (folder / "summary.json").write_text('{"status": "running", "step": 0}')
    with pytest.raises(BadInput, match=name):
        run(xattn.config.compose(command), folder)
    assert (folder / name).read_text() == text


def test_of_many_keys_that_differ_some_are_named(command: list[str], untouched: Path, cwd: Path) -> None:
    shutil.copytree(untouched, cwd / "here")
    training = train(*command, *(f"{key}={value}" for key, value in OTHER.items()), "hydra.run.dir=here", cwd=cwd)
    assert training.wait() == 2
    assert "backend.activation" in training.err
    assert len(training.err.splitlines()) <= 5
    assert (cwd / "here" / "metrics.jsonl").read_bytes() == (untouched / "metrics.jsonl").read_bytes()


@pytest.fixture
def own_text(text_file: Path, cwd: Path) -> Path:
    """A copy of the text that a test may change; its name is the same in each working folder."""
    return Path(shutil.copy(text_file, cwd / "text.txt"))


@pytest.fixture
def own_command(own_text: Path) -> list[str]:
    return [*TINY, "data=text", f"data.path={own_text.name}"]


def test_a_new_time_stamp_of_the_data_is_nothing(
    own_text: Path, own_command: list[str], cwd: Path, reference: Reference
) -> None:
    train(*own_command, cwd=cwd, points=["step:9"])
    os.utime(own_text, (0, 0))
    training = train(*own_command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize("change", ["one byte", "longer", "empty", "short", "gone"])
def test_other_data_are_four_and_with_the_first_ones_back_the_run_goes_on(
    change: str, own_text: Path, own_command: list[str], cwd: Path, reference: Reference
) -> None:
    """Once the run has begun, data that are missing or empty are data that differ."""
    train(*own_command, cwd=cwd, points=["step:9"])
    before = own_text.read_bytes()
    match change:
        case "one byte":
            own_text.write_bytes(before[:1000] + b"#" + before[1001:])
        case "longer":
            own_text.write_bytes(before + b"\n")
        case "empty":
            own_text.write_bytes(b"")
        case "short":
            own_text.write_bytes(before[:100])
        case "gone":
            own_text.unlink()
    metrics = (the_run(cwd) / "metrics.jsonl").read_bytes()
    training = train(*own_command, cwd=cwd)
    assert training.wait() == 4, training.out + training.err
    assert "Traceback" not in training.err
    assert len(training.err.splitlines()) <= 5
    assert (the_run(cwd) / "metrics.jsonl").read_bytes() == metrics
    own_text.write_bytes(before)
    training = train(*own_command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize("change", ["another", "gone", "the run's own"])
def test_another_tokenizer_is_four_and_with_the_first_one_back_the_run_goes_on(
    change: str, text_file: Path, cwd: Path
) -> None:
    """And a run whose data and tokenizer are gone can still be opened: it keeps the tokenizer."""
    source = cwd / "tokenizer.json"
    source.write_text(train_bpe(iter([text_file.read_text()]), 300))
    (data := cwd / "text.txt").write_bytes(text_file.read_bytes())
    command = [*TINY, "data=text", "data.path=text.txt", "data.tokenizer=tokenizer.json", "data.documents=packed"]
    assert train(*command, cwd=cwd, points=["step:9"]).wait() != 0
    changed = the_run(cwd) / "tokenizer.json" if change == "the run's own" else source
    before = changed.read_text()
    changed.write_text(train_bpe(iter([text_file.read_text()]), 299)) if change != "gone" else changed.unlink()
    training = train(*command, cwd=cwd)
    assert training.wait() == 4, training.out + training.err
    assert "tokenizer" in training.err
    changed.write_text(before)
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    source.unlink()
    data.unlink()
    loaded = xattn.load(the_run(cwd))
    assert loaded.tokenizer.vocab_size == 300
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("line 7: 7 + 5")) == "line 7: 7 + 5"


def test_a_folder_that_was_moved_goes_on_in_its_new_place(command: list[str], cwd: Path, reference: Reference) -> None:
    train(*command, cwd=cwd, points=["step:15"])
    moved = cwd / "another place"
    the_run(cwd).rename(moved)
    training = train(*command, f'hydra.run.dir="{moved}"', cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert "resumed     from step" in training.out
    assert differences(moved, reference) == []


def test_another_pace_of_checkpoints_is_the_same_run(command: list[str], cwd: Path, reference: Reference) -> None:
    train(*command, cwd=cwd, points=["step:9"])
    training = train(*command, "trainer.checkpoint_every=null", cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []
    assert reference.summary["step"] == STEPS
