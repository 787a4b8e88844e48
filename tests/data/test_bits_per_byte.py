"""Bits per byte are of the bytes that were read, whatever the tokenizer makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from xattn.data import corpus as corpora, documents
from xattn.data.batches import Batching
from xattn.data.bpe import train_bpe
from xattn.data.cache import Tokens
from xattn.data.corpus import load_corpus
from xattn.data.run_data import RunData, load_data
from xattn.data.tokenizer import JsonTokenizer
from xattn.errors import BadInput

from .configs import memmap_config, text_config

LINES = "".join(f"The {i}th of the lines isn't wide.\n\n  It's   {i * i}\tlong.\n" for i in range(300))
BPE = train_bpe(iter([LINES]), 300)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without_decoder() -> str:
    """Byte-level, as some are published: what joins the tokens again is left to other code."""
    return json.dumps(json.loads(BPE) | {"decoder": None})


def word_pieces() -> str:
    """As an English BERT: lower case, spaces dropped, one [UNK] for each Chinese character."""
    entries = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz'.0123456789", "the", "of", *(f"##{c}" for c in "abcdefghijklmnop")]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]"])
    return str(tokenizer.to_str())


def with_prefix() -> str:
    """Byte-level, with a space before each text that is not in it."""
    loaded = json.loads(BPE)
    loaded["pre_tokenizer"]["add_prefix_space"] = True
    return json.dumps(loaded)


def upper_case() -> str:
    """Byte-level, with a normaliser that changes how many bytes there are: ß is SS, ŉ is ʼN."""
    loaded = json.loads(BPE)
    loaded["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "Lowercase"}]}
    return json.dumps(loaded)


def metaspace() -> str:
    """As a Llama: ▁ for spaces, bytes for what is not in the vocabulary."""
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz."]
    model = models.BPE({token: i for i, token in enumerate(entries)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return str(tokenizer.to_str())


KINDS: dict[str, Callable[[], str]] = {
    "bpe": lambda: BPE,
    "no decoder": without_decoder,
    "WordPiece": word_pieces,
    "prefix": with_prefix,
    "normaliser": upper_case,
    "Metaspace": metaspace,
}


def data_of(folder: Path, content: bytes, tokenizer: str, said: list[str] | None = None, **values: object) -> RunData:
    (folder / "text.txt").write_bytes(content)
    (folder / "t.json").write_text(tokenizer)
    config = text_config(path=str(folder / "text.txt"), tokenizer=str(folder / "t.json"), **values)
    say = (said if said is not None else []).append
    return load_data(config, Batching(context_length=8, batch_size=4, sequences="all", seed=0), say=say)


def scored_tokens(data: RunData) -> int:
    return sum(int(each.weights.sum()) for each in data.held_out)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(blocks=st.lists(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), max_size=4))
def test_sizes_are_all_of_the_text_whatever_it_is(kind: str, blocks: list[bytes]) -> None:
    """Each token has a size, none is negative, and together they are the bytes that were read."""
    tokenizer = JsonTokenizer(KINDS[kind]())
    for text, encoded in zip(blocks, tokenizer.encode_blocks(blocks), strict=True):
        np.testing.assert_array_equal(encoded.ids, tokenizer.encode(text.decode("utf-8", errors="replace")))
        sizes = tokenizer.sizes(encoded.ids) if encoded.sizes is None else encoded.sizes
        assert sizes.dtype == np.uint32
        assert len(sizes) == len(encoded.ids)
        assert sizes.sum(dtype=np.int64) == (len(text) if len(sizes) else 0)
        assert encoded.gives_back == (tokenizer.to_bytes(encoded.ids) == text)


def test_a_byte_level_tokenizer_without_a_decoder_is_byte_level(tmp_path: Path) -> None:
    """It was decoded with spaces between its tokens, and in GPT-2's characters: too many bytes."""
    said = list[str]()
    with_it = data_of(tmp_path, LINES.encode(), BPE, said)
    without = data_of(tmp_path, LINES.encode(), without_decoder(), said)
    assert without.bytes_per_token() == with_it.bytes_per_token()
    assert LINES.encode().endswith(without.scored_bytes() or b"none")
    assert without.tokenizer.decode(without.tokenizer.encode("isn't it")) == "isn't it"
    assert said == []


def test_latin_1_under_bpe_has_a_byte_for_each_letter(tmp_path: Path) -> None:
    """It was counted as three for each ä. Here a letter is a byte, so the decoded text has as many letters."""
    text = ("Übergänge für größere Städte, ohne Säumnis " * 40).encode("latin-1")
    said = list[str]()
    data = data_of(tmp_path, text, BPE, said, validation_fraction=0.21)
    targets = np.concatenate([each.targets[each.weights > 0] for each in data.held_out])
    decoded = data.tokenizer.decode(targets)
    assert decoded.count("\ufffd") > 10
    assert data.scored_size == len(decoded.lstrip("\ufffd"))  # it begins within a letter, which counts before
    assert data.scored_bytes() is None, "what was scored is not there any more for gzip to pack"
    assert len(said) == 1
    assert "t.json does not reproduce the text exactly" in said[0]


def test_text_that_a_vocabulary_lacks_has_its_bytes(tmp_path: Path) -> None:
    """Chinese under an English WordPiece decodes to nothing: the first evaluation divided by zero."""
    text = "".join(chr(0x4E00 + i % 999) for i in range(2000)).encode()
    data = data_of(tmp_path, text, word_pieces())
    assert data.bytes_per_token() == 3
    assert data.scored_size == 3 * scored_tokens(data)
    assert data.scored_bytes() is None


def test_spaces_that_are_dropped_count(tmp_path: Path) -> None:
    data = data_of(tmp_path, b"a    b \n" * 400, word_pieces())
    assert data.bytes_per_token() == pytest.approx(4, rel=0.02)
    upper = data_of(tmp_path, b"AB" * 400 + b" The of THE OF\n" * 400, word_pieces())
    assert upper.bytes_per_token() == pytest.approx(15 / 4, rel=0.02)


@pytest.mark.parametrize("kind", ["bpe", "no decoder"])
@pytest.mark.parametrize("documents", ["joined", "separated", "packed"])
def test_what_was_right_is_the_same_number(kind: str, documents: str, tmp_path: Path, cache_home: Path) -> None:
    """UTF-8 in byte-level tokens: each stands for its bytes, an end of text for none, and no sizes are stored."""
    data = data_of(tmp_path, (LINES + "äöü 字 🎲 " * 99).encode(), KINDS[kind](), documents=documents)
    assert isinstance(data.tokenizer, JsonTokenizer)
    decoded = sum(len(data.tokenizer.to_bytes(each.targets[each.weights > 0])) for each in data.held_out)
    assert data.bytes_per_token() == decoded / scored_tokens(data)
    assert list(cache_home.rglob("*.bin"))
    assert not list(cache_home.rglob("*.sizes"))


def test_sizes_come_from_the_cache_as_they_were_and_damaged_ones_are_made_again(
    tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard in the middle alone is not UTF-8; the ones beside it have no sizes of their own."""
    for module in (corpora, documents):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    text = b"a line that is whole\n" * 100 + "eine Zeile, übergroß\n".encode("latin-1") * 40 + b"and whole\n" * 300
    first = data_of(tmp_path, text, BPE, validation_fraction=0.9)
    (sizes, *others) = sorted(cache_home.rglob("*.sizes"))
    assert len(others) < 2 < 4 < len(list(cache_home.rglob("*.bin")))
    said = list[str]()
    assert data_of(tmp_path, text, BPE, said, validation_fraction=0.9).scored_size == first.scored_size
    assert len(said) == 1
    for content in (b"", sizes.read_bytes()[:-4], b"\7" + sizes.read_bytes()[1:]):
        sizes.write_bytes(content)
        said.clear()
        assert data_of(tmp_path, text, BPE, said, validation_fraction=0.9).scored_size == first.scored_size
        assert "damaged" in said[0]
    corpus = load_corpus(text_config(path=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "t.json")), 4)
    found = 0
    for ids in (corpus.parts[0].train, corpus.parts[0].validation):
        assert isinstance(ids, Tokens)
        found += int(ids.sizes(slice(0, len(ids)), corpus.tokenizer.sizes).sum())  # type: ignore[attr-defined]
    assert found == len(text)


def test_ids_that_decode_to_nothing_have_no_bits_per_byte(tmp_path: Path) -> None:
    """Of memmap nobody has seen the text."""
    (tmp_path / "t.json").write_text(word_pieces())
    np.zeros(400, "<u2").tofile(tmp_path / "ids.bin")
    config = memmap_config(path=str(tmp_path / "ids.bin"), vocab_size=300, tokenizer=str(tmp_path / "t.json"))
    data = load_data(config, Batching(context_length=8, batch_size=4, sequences="all", seed=0))
    assert data.bytes_per_token() is None


# ---- what the library raises -----------------------------------------------------------------------------------------


def refused(folder: Path, tokenizer: dict[str, object] | str) -> str:
    text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    with pytest.raises(BadInput, match=r"data\.tokenizer") as error:
        data_of(folder, b"words and zebras " * 99, text)
    assert "t.json" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


PIECES = {
    "type": "WordPiece",
    "vocab": {"a": 0},
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (PIECES, "Missing [UNK] token"),
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, "Missing [UNK] token"),
        ({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}, "unk_id"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<u>"}, "<u>"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "not a tokenizer.json: Token `b`"),
        ({"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}, "has the id 4294967295"),
    ],
    ids=["WordPiece", "WordLevel", "Unigram", "BPE", "merge", "id"],
)
def test_a_tokenizer_without_what_it_needs_is_bad_input(model: dict[str, object], told: str, tmp_path: Path) -> None:
    """At its first use the library raises a plain Exception, which was an error of our own with a traceback."""
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert told in refused(tmp_path, json.loads(words.to_str()) | {"model": model})


def test_a_panic_of_the_library_is_bad_input(tmp_path: Path) -> None:
    """It is no Exception, and went through every handler of ours."""
    normaliser = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    assert "not a tokenizer.json: Precompiled" in refused(tmp_path, json.loads(BPE) | {"normalizer": normaliser})
