"""Byte-level BPE by Hugging Face's ``tokenizers``: trained on text, or converted from a .tiktoken file of ranks."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator

from xattn.data.tokenizer import byte_characters

END_OF_TEXT = "<|endoftext|>"
_NO_TIKTOKEN = "not a .tiktoken file"

# Vocabulary → the pattern that splits text into words before BPE (github.com/openai/tiktoken). They match the same, but
# have no possessive quantifiers, which this library's engine interprets differently.
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    "cl100k": (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


# tiktoken's encodings, identified by the last rank in their files, with the ids of their special tokens as in its
# openai_public: r50k_base (gpt2's are the same), p50k_base, cl100k_base, o200k_base.
SPECIAL_TOKENS = {
    50255: {END_OF_TEXT: 50256},
    50280: {END_OF_TEXT: 50256},
    100255: {
        END_OF_TEXT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    199997: {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
}


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909; GPT-2's bytes and pattern); return its tokenizer.json.

    It has vocab_size entries, including the 256 bytes and an end of text, or fewer if the text has no more pairs to
    merge. The same texts give the same tokenizer for any number of threads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def from_tiktoken(content: bytes, pattern: str) -> str:
    """Return the tokenizer.json that encodes as tiktoken does with these ranks; a line is ``<base64 of the bytes>
    <rank>``.

    The file has ranks, but this library wants pairs to merge. A token's pair is what BPE with only the lower ranks
    leaves of it. Special tokens have tiktoken's ids if the last rank is that of one of its encodings; otherwise the end
    of text is the id after the last. Raises ValueError, with the line, if the content is not such a file.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks, lines = _ranks(content)
    last = max(ranks.values())
    special = SPECIAL_TOKENS.get(last, {END_OF_TEXT: last + 1})
    if absent := set(range(last)) - set(ranks.values()) - set(special.values()):
        raise ValueError(f"{_NO_TIKTOKEN}: no line has rank {min(absent)}, but one has rank {last}")
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    pairs = [_pair(ranks, token, lines) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    # A special token that the vocabulary has keeps its id; the library gives others the id after the last.
    placed = {name: i for name, i in special.items() if special != {END_OF_TEXT: len(ranks)}}
    model = models.BPE(
        {written(token): rank for token, rank in ranks.items()} | placed,
        [(written(a), written(b)) for a, b in pairs],
        ignore_merges=True,  # a whole word that is a token is that token, as in tiktoken
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return str(tokenizer.to_str())


def _ranks(content: bytes) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Return two tables: token → its rank, and token → its line number."""
    ranks, lines, seen = dict[bytes, int](), dict[bytes, int](), set[int]()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, written = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(written)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{_NO_TIKTOKEN}: line {number} is not base64 and a rank: {line[:40]!r}") from error
        if not 0 <= rank < 2**24 or rank in seen or token in ranks or not token:
            raise ValueError(
                f"{_NO_TIKTOKEN}: line {number} repeats a token or rank, or has an invalid one: {line[:40]!r}"
            )
        ranks[token], lines[token] = rank, number
        seen.add(rank)
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{_NO_TIKTOKEN}: {len(absent)} of the 256 bytes have no line; the first is {absent[0]:#04x}")
    return ranks, lines


def _pair(ranks: dict[bytes, int], token: bytes, lines: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        lower = [each for each in found if each[0] < ranks[token]]
        if not lower:
            raise ValueError(
                f"{_NO_TIKTOKEN}: line {lines[token]}: no two tokens of lower ranks join to {token[:40]!r}"
            )
        _, i = min(lower)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
