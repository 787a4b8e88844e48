"""Byte-level BPE by Hugging Face's ``tokenizers``: trained on text, or taken from a .tiktoken file of ranks."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator

END_OF_TEXT = "<|endoftext|>"

# The patterns that cut text into words before BPE, of the vocabularies of that name (github.com/openai/tiktoken),
# written without possessive quantifiers, which this library's engine reads otherwise; they match the same.
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


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE (Sennrich et al., arXiv 1508.07909; GPT-2's bytes and pattern).

    vocab_size entries, the 256 bytes and an end of text among them; fewer where the text has no more pairs to merge.
    The same texts give the same tokenizer, however many threads there are.
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
    """The tokenizer.json that encodes as tiktoken does with these ranks, each line ``<base64 of the bytes> <rank>``.

    The file has ranks where this library wants pairs to merge: the pair of a token is what BPE with the ranks below its
    own leaves of it. The end of text is the id after the last. Raises ValueError where the content is no such file.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from xattn.data.tokenizer import byte_characters

    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"not a .tiktoken file, with lines of base64 and a rank: {error}") from error
    if {bytes([byte]) for byte in range(256)} - set(ranks) or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("not a .tiktoken file: it lacks some of the 256 bytes, or its ranks are not 0, 1, 2, …")
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    pairs = [_pair(ranks, token) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    model = models.BPE(
        {written(token): rank for token, rank in ranks.items()},
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
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return str(tokenizer.to_str())


def _pair(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        lower = [each for each in found if each[0] < ranks[token]]
        if not lower:
            raise ValueError(f"not a .tiktoken file: no two entries join to {token!r}")
        _, i = min(lower)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
