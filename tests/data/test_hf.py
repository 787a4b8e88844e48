"""Datasets of Hugging Face's library: local ones, saved or as files. Nothing here reaches for the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xattn.data import hf
from xattn.data.corpus import Corpus, load_corpus
from xattn.errors import BadInput

from .configs import hf_config

datasets = pytest.importorskip("datasets")
ROWS = [f"row {i} of some text, äöü\n" for i in range(250)]
TEXT = "".join(ROWS).encode()


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path: Path) -> str:
    table = datasets.Dataset.from_dict({"id": list(range(250)), "text": ROWS})
    datasets.DatasetDict({"train": table, "few": table.select(range(20))}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def whole(corpus: Corpus) -> bytes:
    (part,) = corpus.parts
    return bytes(part.train[:].tobytes() + part.validation[:].tobytes())


def test_a_saved_dataset_streaming_or_not(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PIECE_ROWS", 60)
    for streaming in (False, True, True):  # the second time from the cache
        assert whole(load_corpus(hf_config(dataset=saved, streaming=streaming), 4)) == TEXT
        some = load_corpus(hf_config(dataset=saved, streaming=streaming, max_documents=101), 4)
        assert whole(some) == "".join(ROWS[:101]).encode()
    assert whole(load_corpus(hf_config(dataset=saved, split="few"), 4)) == "".join(ROWS[:20]).encode()
    packed = load_corpus(hf_config(dataset=saved, documents="packed", tokenizer="bpe"), 4)
    ids = [*packed.parts[0].train[:].tolist(), *packed.parts[0].validation[:].tolist()]
    assert ids.count(packed.end_of_text) == 250


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "files" / "rows.parquet")
    assert whole(load_corpus(hf_config(dataset=str(tmp_path / "files")), 4)) == TEXT


def test_other_content_is_another_hash(saved: str, tmp_path: Path) -> None:
    before = load_corpus(hf_config(dataset=saved), 4).sha256
    assert load_corpus(hf_config(dataset=saved), 4).sha256 == before
    changed = datasets.Dataset.from_dict({"text": [*ROWS[:-1], "another row\n"]})
    changed.save_to_disk(tmp_path / "other")
    assert load_corpus(hf_config(dataset=str(tmp_path / "other")), 4).sha256 != before


def test_each_part_of_a_file_is_a_corpus_of_its_own(tmp_path: Path) -> None:
    """The library keeps both halves in one file, and ours keeps their tokens: under keys that differ."""
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "files" / "rows.parquet")
    values = {"dataset": str(tmp_path / "files"), "tokenizer": "bpe", "vocab_size": 257}
    first, second = (load_corpus(hf_config(split=split, **values), 4) for split in ("train[:50%]", "train[50%:]"))
    assert first.sha256 != second.sha256
    assert first.parts[0].train[:].tolist() != second.parts[0].train[:].tolist()


def test_a_streamed_folder_that_has_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has the same name in another place."""
    found = []
    for number in range(2):
        (tmp_path / f"{number}" / "corpus").mkdir(parents=True)
        rows = [f"{number} {row}" for row in ROWS]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / f"{number}" / "corpus" / "rows.parquet")
        monkeypatch.chdir(tmp_path / f"{number}")
        found.append(load_corpus(hf_config(dataset="corpus", streaming=True), 4))
        assert whole(found[-1]) == "".join(rows).encode()
    assert found[0].sha256 != found[1].sha256


def test_what_a_saved_dataset_does_not_have_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "plain")
    for values, told in (
        ({"split": "test"}, r"data\.split = 'test': .* has no splits"),
        ({"subset": "x"}, r"data\.subset"),
        ({"revision": "x"}, r"data\.revision"),
    ):
        with pytest.raises(BadInput, match=told):
            load_corpus(hf_config(dataset=str(tmp_path / "plain"), **values), 4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"split": "test"}, r"data\.split = 'test': no such split; allowed: train, few"),
        ({"field": "body"}, r"no column 'body'; choose one of 'id', 'text' with data\.field"),
        ({"field": "id"}, r"row 0: 'id' is not a string"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_there_is_bad_input(streaming: bool, values: dict[str, Any], told: str, saved: str) -> None:
    with pytest.raises(BadInput, match=told):
        load_corpus(hf_config(dataset=saved, streaming=streaming, **values), 4)


def test_a_dataset_that_cannot_be_found_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"data\.dataset = 'no/such-dataset'"):
        load_corpus(hf_config(dataset="no/such-dataset"), 4)


def test_without_the_library_the_extra_is_named(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(BadInput, match=r"^data=hf needs the extra hf: pip install (-e )?\".*\[hf\]\""):
        load_corpus(hf_config(dataset=saved), 4)
