"""Tokenizers of the library: trained on the corpus, from tokenizer.json, from tiktoken's ranks."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public

from xattn.data.batches import Batching
from xattn.data.bpe import END_OF_TEXT, SPECIAL_TOKENS, from_tiktoken, train_bpe
from xattn.data.corpus import load_corpus
from xattn.data.run_data import load_data, load_tokenizer
from xattn.data.tokenizer import JsonTokenizer
from xattn.errors import BadInput, IntegrityError
from xattn.runs import run_folder
from xattn.runs.run_folder import write_atomically

from .configs import memmap_config, text_config

TEXTS = [f"The {i}th line isn't like the {i + 1}th.\n\n  It's   {i * i}\twide, äöü 字 🎲!\r\n" for i in range(300)]
ODD = [
    "",
    " ",
    "\n\n\n",
    "  two  spaces  ",
    "don't WON'T I'LL",
    "x" * 300,
    "1234567 89",
    "a\r\n\r\n b",
    "🎲🎲 字字",
    "\0\x01",
]


@pytest.fixture(scope="module")
def trained() -> str:
    return train_bpe(iter(TEXTS), 400)


def test_training_is_deterministic_also_with_one_thread(trained: str) -> None:
    assert train_bpe(iter(TEXTS), 400) == trained
    program = (
        "from tests.data.test_bpe import TEXTS; from xattn.data.bpe import train_bpe; import hashlib; "
        "print(hashlib.sha256(train_bpe(iter(TEXTS), 400).encode()).hexdigest())"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(trained.encode()).hexdigest()


def test_any_text_comes_back_and_its_ids_stand_for_its_bytes(trained: str) -> None:
    tokenizer = JsonTokenizer(trained)
    assert tokenizer.vocab_size == 400
    assert tokenizer.end_of_text == 0
    for text in [*TEXTS[:5], *ODD]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.to_bytes(ids) == text.encode()
    blocks = tokenizer.encode_blocks([text.encode() for text in TEXTS])
    for text, block in zip(TEXTS, blocks, strict=True):
        np.testing.assert_array_equal(block.ids, tokenizer.encode(text))
        assert block.sizes is None
        assert block.gives_back
    assert sum(len(block.ids) for block in blocks) < 0.6 * sum(len(text.encode()) for text in TEXTS)
    assert tokenizer.encode_blocks([b"ab\xff\xfec"])[0].ids.tolist() == tokenizer.encode("ab\ufffd\ufffdc").tolist()
    assert tokenizer.to_bytes(np.array([0, *tokenizer.encode("a"), 0])) == b"a"
    with pytest.raises(ValueError, match="400: not an id"):
        tokenizer.decode([400])


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_tiktoken_files_encode_as_tiktoken_does(pattern: str, trained: str) -> None:
    """Ranks as tiktoken has them, bytes first; its own patterns, which are written otherwise."""
    tokens = JsonTokenizer(trained)._bytes
    assert tokens is not None
    ranks = {token: rank for rank, token in enumerate(tokens[1:])}
    source = Path(openai_public.__file__).read_text()
    patterns = {
        "gpt2": openai_public.r50k_pat_str,
        "cl100k": source.split("def cl100k_base")[1].split('"pat_str": r"""')[1].split('"""')[0],
    }
    with_it = tiktoken.Encoding(
        "ours", pat_str=patterns.get(pattern, _o200k(source)), mergeable_ranks=ranks, special_tokens={}
    )
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    ours = JsonTokenizer(from_tiktoken(content, pattern))
    assert ours.vocab_size == len(ranks) + 1
    assert ours.end_of_text == len(ranks)
    for text in [*TEXTS[:40], *ODD, "".join(TEXTS)]:
        assert ours.encode(text).tolist() == with_it.encode(text), text
        assert ours.decode(ours.encode(text)) == text


def _o200k(source: str) -> str:
    lines = source.split("def o200k_base")[1].split("[\n")[1].split("\n        ]")[0]
    return "|".join(eval(line.strip().rstrip(",")) for line in lines.splitlines() if line.strip().startswith('r"""'))


def ranks_of(number: int, hole: int | None = None) -> bytes:
    """A file of as many ranks as an encoding of tiktoken has: bytes, pairs of bytes, and longer ones."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    longer = (bytes([a, b, c]) for a in b"abc" for b in range(256) for c in range(256))
    tokens = itertools.chain((bytes([byte]) for byte in range(256)), pairs, longer)
    ranks = (rank for rank in range(number) if rank != hole)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in zip(ranks, tokens, strict=False))


@pytest.mark.parametrize(
    ("encoding", "pattern", "number", "hole"),
    [
        ("r50k_base", "gpt2", 50_256, None),
        ("p50k_base", "gpt2", 50_281, 50_256),
        ("cl100k_base", "cl100k", 100_256, None),
        pytest.param("o200k_base", "o200k", 199_998, None, marks=pytest.mark.slow),
    ],
)
def test_special_tokens_have_the_ids_that_tiktoken_gives_them(
    encoding: str, pattern: str, number: int, hole: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of text of cl100k is 100257, one after the id after the last rank; p50k has it among its ranks."""
    content = ranks_of(number, hole)
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines())}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    peer = tiktoken.Encoding(**getattr(openai_public, encoding)())
    ours = JsonTokenizer(from_tiktoken(content, pattern))
    assert ours.end_of_text == peer.eot_token
    assert ours.vocab_size == peer.n_vocab
    assert SPECIAL_TOKENS[max(ranks.values())] == peer._special_tokens
    text = "".join([*TEXTS[:20], *ODD, END_OF_TEXT])
    assert ours.encode(text).tolist() == peer.encode(text, disallowed_special=())
    assert ours.to_bytes(ours.encode(text)) == text.encode()
    assert ours.to_bytes(np.array([*peer._special_tokens.values()])) == b""


@pytest.mark.parametrize(
    "content",
    [b"", b"no ranks here", b"YQ== 0\n", base64.b64encode(b"a") + b" x\n"],
    ids=["empty", "text", "few", "word"],
)
def test_what_is_no_tiktoken_file_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_bytes(content)
    (tmp_path / "text").write_text("text " * 99)
    config = text_config(path=str(tmp_path / "text"), tokenizer=str(tmp_path / "a.tiktoken"), tiktoken_pattern="gpt2")
    with pytest.raises(BadInput, match=r"data\.tokenizer = .*a\.tiktoken.*not a \.tiktoken file"):
        load_corpus(config, 4)


BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([*BYTES[:7], b"%%% 7", *BYTES[8:]], "line 8 is not base64 and a rank: b'%%% 7'"),
        ([*BYTES[:7], b"", b"BQ== seven", *BYTES[8:]], "line 9 is not base64 and a rank"),
        ([*BYTES, b"YWI="], "line 257 is not base64 and a rank"),
        ([*BYTES, b"YWI= 12"], "line 257 repeats a token or rank, or has an invalid one"),
        ([*BYTES, b"YQ== 256"], "line 257 repeats a token or rank, or has an invalid one"),
        ([*BYTES, b"YWI= 99999999999"], "line 257 repeats a token or rank, or has an invalid one"),
        ([*BYTES, b"YWJj 256"], "line 257: no two tokens of lower ranks join to b'abc'"),
        ([*BYTES, b"YWI= 260"], "no line has rank 256"),
        (BYTES[:-3], "3 of the 256 bytes have no line; the first is 0xfd"),
    ],
)
def test_a_bad_line_of_ranks_is_named(lines: list[bytes], told: str) -> None:
    with pytest.raises(ValueError, match=r"^not a \.tiktoken file: ") as error:
        from_tiktoken(b"\r\n".join(lines), "gpt2")
    assert told in str(error.value)


def test_the_name_of_a_special_token_is_text(trained: str) -> None:
    """Or a page of HTML would have documents end within it, and bytes that nobody counts."""
    tokenizer = JsonTokenizer(trained)
    text = f"a {END_OF_TEXT} b"
    for ids in (tokenizer.encode(text), tokenizer.encode_blocks([text.encode()])[0].ids):
        assert tokenizer.end_of_text not in ids
        assert tokenizer.to_bytes(ids) == text.encode()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bpe_has_not_seen_what_is_held_out(name: str, tmp_path: Path) -> None:
    """In a file of rows too, most of which may be other than text."""
    rows = [f"{'ZZZZ YYYY' if i >= 120 else 'alpha beta'} {i}\n" for i in range(200)]
    other = "x" * 500
    lines = rows if name == "a.txt" else [json.dumps({"text": row, "other": other[i:]}) for i, row in enumerate(rows)]
    (tmp_path / name).write_text("\n".join(lines))
    config = text_config(path=str(tmp_path / name), tokenizer="bpe", validation_fraction=0.5, vocab_size=300)
    corpus = load_corpus(config, 4)
    assert isinstance(corpus.tokenizer, JsonTokenizer)
    assert len(corpus.tokenizer.encode("alpha")) < len(corpus.tokenizer.encode("ZZZZ")) == 4


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 3}'])
def test_what_is_no_tokenizer_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    (tmp_path / "text").write_text("text " * 99)
    for name, told in (("t.json", "not a tokenizer.json"), ("no.json", "allowed: bytes, bpe, the path")):
        with pytest.raises(BadInput, match=told):
            load_corpus(text_config(path=str(tmp_path / "text"), tokenizer=str(tmp_path / name)), 4)


def test_a_tokenizer_without_an_end_of_text_can_only_join(trained: str, tmp_path: Path) -> None:
    loaded = json.loads(trained)
    loaded["added_tokens"] = []
    del loaded["model"]["vocab"][END_OF_TEXT]
    loaded["model"]["vocab"]["<border>"] = 0
    (tmp_path / "t.json").write_text(json.dumps(loaded))
    (tmp_path / "text").write_text("text " * 99)
    values = {"path": str(tmp_path / "text"), "tokenizer": str(tmp_path / "t.json")}
    load_corpus(text_config(**values), 4)
    with pytest.raises(BadInput, match=r"data\.end_of_text"):
        load_corpus(text_config(**values, documents="packed"), 4)
    with pytest.raises(BadInput, match="has no token '<nothing>'"):
        load_corpus(text_config(**values, documents="packed", end_of_text="<nothing>"), 4)
    corpus = load_corpus(text_config(**values, documents="packed", end_of_text="<border>"), 4)
    assert corpus.end_of_text == 0
    assert corpus.parts[0].train[0:1].tolist() == [0]


def test_a_tokenizer_of_another_kind_counts_what_it_decodes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = JsonTokenizer(words.to_str())
    ids = tokenizer.encode("to be or xx be")
    assert ids.tolist() == [0, 1, 2, 3, 1]
    assert tokenizer.to_bytes(ids) == b"to be or ? be"


def test_the_run_folder_keeps_the_tokenizer(trained: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained)
    joined = load_tokenizer(text_config(path="gone", tokenizer="bpe"), tmp_path)
    assert joined.encode("The line").tolist() == JsonTokenizer(trained).encode("The line").tolist()
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_tokenizer(text_config(path="gone", tokenizer="bpe"), tmp_path / "nowhere")
    assert load_tokenizer(text_config(path="gone", documents="packed"), tmp_path / "nowhere").vocab_size == 257
    assert load_tokenizer(memmap_config(path="gone", vocab_size=9), tmp_path / "nowhere").vocab_size == 9
    padded = load_tokenizer(memmap_config(path="gone", vocab_size=512, tokenizer="gone.json"), tmp_path)
    assert padded.vocab_size == 512
    assert padded.decode([511]) == ""


def test_a_tokenizer_with_crlf_is_kept_to_the_byte(tmp_path: Path) -> None:
    """What the run's folder keeps is what the next start compares."""
    (tmp_path / "text").write_text("".join(TEXTS))
    text = json.dumps(json.loads(train_bpe(iter(TEXTS), 300)), indent=1).replace("\n", "\r\n")
    (tmp_path / "crlf.json").write_bytes(text.encode())
    config = text_config(path=str(tmp_path / "text"), tokenizer=str(tmp_path / "crlf.json"))
    data = load_data(config, Batching(context_length=8, batch_size=2, sequences=2, seed=0))
    assert data.tokenizer_json is not None
    write_atomically(tmp_path / run_folder.TOKENIZER, data.tokenizer_json)
    assert b"\r\n" in (tmp_path / run_folder.TOKENIZER).read_bytes()
    data.check_tokenizer(tmp_path)
    (tmp_path / run_folder.TOKENIZER).write_bytes(text.encode() + b" ")
    with pytest.raises(IntegrityError, match="not the tokenizer"):
        data.check_tokenizer(tmp_path)
