"""Text as it is generated: each piece once no later token can change it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from xattn.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A piece of generated text."""

    text: str
    """Empty if the tokens so far end in the middle of a character."""
    num_tokens: int


def pieces(tokenizer: Tokenizer, drawn: Iterable[Any], stop: Sequence[str]) -> Iterator[Piece]:
    ids: list[int] = []
    shown = given = 0
    for tokens in drawn:
        ids += tokens.tolist()
        text = tokenizer.decode(ids)
        ends = [place for word in stop if (place := text.find(word, shown)) >= 0]
        if ends:
            yield Piece(text[shown : min(ends)], len(ids) - given)
            return
        # An incomplete character decodes to U+FFFD, up to three of them; and a stop text may have begun.
        settled = max(shown, len(text) - _unsettled(text, stop))
        yield Piece(text[shown:settled], len(ids) - given)
        shown, given = settled, len(ids)
    yield Piece(tokenizer.decode(ids)[shown:], 0)


def _unsettled(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end later tokens may change, or may belong to a stop text."""
    whole = text.rstrip("\ufffd")
    open_letters = min(3, len(text) - len(whole))
    begun = (size for word in stop for size in range(1, len(word)) if whole.endswith(word[:size]))
    return max(begun, default=0) + open_letters
