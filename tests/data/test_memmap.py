"""Arrays of ids that are there already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xattn.data.corpus import check, load_corpus
from xattn.errors import BadInput

from .configs import memmap_config

IDS = np.arange(200) % 97


def test_a_folder_of_nanogpt_is_taken_as_it_is(tmp_path: Path) -> None:
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    IDS[50:90].astype("<u2").tofile(tmp_path / "val.bin")
    corpus = load_corpus(memmap_config(path=str(tmp_path), vocab_size=97), 4)
    (part,) = corpus.parts
    np.testing.assert_array_equal(part.train[:], IDS)
    np.testing.assert_array_equal(part.validation[:], IDS[50:90])
    (tmp_path / "val.bin").unlink()
    np.save(tmp_path / "val.npy", IDS[50:90].astype(np.int64))
    assert load_corpus(memmap_config(path=str(tmp_path), vocab_size=97), 4).parts[0].validation[0:3].tolist() == [
        50,
        51,
        52,
    ]
    np.save(tmp_path / "val.npy", IDS[50:91].astype(np.int64))
    assert load_corpus(memmap_config(path=str(tmp_path), vocab_size=97), 4).sha256 != corpus.sha256


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_one_file_is_split_at_its_end(dtype: str, tmp_path: Path) -> None:
    IDS.astype(np.dtype(dtype).newbyteorder("<")).tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "ids.npy", IDS.astype(dtype))
    for name in ("ids.bin", "ids.npy"):
        config = memmap_config(path=str(tmp_path / name), dtype=dtype, vocab_size=97, validation_fraction=0.25)
        (part,) = load_corpus(config, 4).parts
        np.testing.assert_array_equal(part.train[:], IDS[:150])
        np.testing.assert_array_equal(part.validation[:], IDS[150:])


def test_ids_out_of_range_are_named(tmp_path: Path) -> None:
    """On a device they would be clamped without a word."""
    IDS.astype("<u2").tofile(tmp_path / "ids.bin")
    config = memmap_config(path=str(tmp_path / "ids.bin"), vocab_size=96)
    with pytest.raises(BadInput, match=r"id 96 at position 96; data\.vocab_size = 96 allows 0 to 95"):
        load_corpus(config, 4)
    np.save(tmp_path / "ids.npy", np.array([3, 4, -1] * 20))
    with pytest.raises(BadInput, match="id -1 at position 2"):
        load_corpus(memmap_config(path=str(tmp_path / "ids.npy"), vocab_size=96), 4)


def test_what_is_no_array_of_ids_is_bad_input(tmp_path: Path) -> None:
    def told(path: Path, **values: object) -> str:
        with pytest.raises(BadInput, match=r"data\.path") as error:
            check(memmap_config(path=str(path), **values))
        return str(error.value)

    assert "no such file" in told(tmp_path / "nowhere")
    assert "needs either train.bin or train.npy, but has neither" in told(tmp_path)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    assert "3 bytes are not a whole number of uint16" in told(tmp_path / "odd.bin")
    (tmp_path / "text.npy").write_text("text")
    assert "is not an array of ids" in told(tmp_path / "text.npy")
    (tmp_path / "empty.npy").write_text("")
    assert "is not an array of ids" in told(tmp_path / "empty.npy")
    np.save(tmp_path / "floats.npy", np.ones(9))
    assert "not a flat array of integers: float64" in told(tmp_path / "floats.npy")
    np.save(tmp_path / "square.npy", np.ones((3, 3), np.int32))
    assert "of shape (3, 3)" in told(tmp_path / "square.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    assert "is not an array of ids" in told(tmp_path / "objects.npy")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="training part has 0 tokens"):
        load_corpus(memmap_config(path=str(tmp_path / "empty.bin")), 4)


@pytest.mark.parametrize("vocabulary", [1000, 50_257, 128_256, 260_000])
@pytest.mark.parametrize(("wide", "dtype"), [("uint32", "uint16"), ("int64", "uint16"), ("int64", "uint32")])
def test_ids_of_another_width_are_refused_by_the_look(wide: str, dtype: str, vocabulary: int, tmp_path: Path) -> None:
    """uint32 read as uint16 is an id and a 0, 1, 2 or 3 in turn: all of them are below the vocabulary's size."""
    ids = np.minimum(np.random.default_rng(0).zipf(1.2, 4000) - 1, vocabulary - 1)
    ids.astype(np.dtype(wide).newbyteorder("<")).tofile(tmp_path / "ids.bin")
    path = str(tmp_path / "ids.bin")
    with pytest.raises(BadInput, match=rf"ids\.bin read as data\.dtype = {dtype}: every .* try data\.dtype={wide}"):
        check(memmap_config(path=path, dtype=dtype, vocab_size=vocabulary))
    right = memmap_config(path=path, dtype=wide, vocab_size=vocabulary)
    check(right)
    np.testing.assert_array_equal(load_corpus(right, 4).parts[0].train[:], ids[:3600])


def test_text_is_no_ids(tmp_path: Path) -> None:
    """Two letters are a number below 50,257."""
    (tmp_path / "train.bin").write_bytes(b"plain text in two columns, " * 40)
    (tmp_path / "val.bin").write_bytes(b"plain text in two columns, " * 40)
    with pytest.raises(BadInput, match=r"train\.bin read as data\.dtype = uint16: it is text"):
        check(memmap_config(path=str(tmp_path), vocab_size=50_257))
    check(memmap_config(path=str(tmp_path), dtype="uint8", vocab_size=256))


@pytest.mark.parametrize("ids", [np.zeros(999), np.arange(999) % 2, np.arange(999) % 7, np.tile([3, 0, 5, 0], 99)])
def test_ids_that_alternate_by_themselves_are_taken(ids: np.ndarray, tmp_path: Path) -> None:
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    check(memmap_config(path=str(tmp_path / "ids.bin")))
