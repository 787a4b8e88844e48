"""What a pack requires of the dispatch table before anything is compiled."""

from __future__ import annotations

import pytest

from xattn.config import compose
from xattn.system.hardware import HARDWARE
from xattn.training.attention_choice import choose_attention


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["backend.decay=alibi"], "a decay or an input gate"),
        (["backend.input_gate=sigmoid"], "a decay or an input gate"),
        (["backend.sink=zero"], "a sink"),
    ],
)
def test_the_terms_of_each_kind_count_when_its_implementation_is_chosen(overrides: list[str], reason: str) -> None:
    """Where cuDNN would serve without them."""
    where = ["model.dtype=bfloat16", "backend.context_length=1024"]
    plain = choose_attention(compose(where), context=1, hardware=HARDWARE["h100"])
    assert plain["backend"].name == "cudnn"
    found = choose_attention(compose([*where, *overrides]), context=1, hardware=HARDWARE["h100"])
    assert found["backend"].name != "cudnn"
    assert reason in found["backend"].passed_over["cudnn"]
    then = "backend.then={" + overrides[0].removeprefix("backend.").replace("=", ": ") + "}"
    kinds = choose_attention(compose([*where, "backend.every=2", then]), context=1, hardware=HARDWARE["h100"])
    assert kinds["backend"].name == "cudnn" != kinds["then"].name
