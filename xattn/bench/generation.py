"""``xattn bench generation``: tokens per second with the cache, and with a whole forward pass for each token.

The latter is what a model without a cache does: one compiled forward pass over the text so far, padded to
context_length, and the likeliest token at its last known position. Both continue the same prompt at temperature 0, in
turns in one process. Medians are reported, without compilation. The cache's time includes reading the prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn.config import compose
from xattn.model.generation import Sampling, TrainedModel, generate
from xattn.model.transformer import LanguageModel, init_params
from xattn.system.arguments import Parser
from xattn.training.programs import hyperparameters

VOCAB_SIZE = 256
FORWARDS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one JSON object. Return an exit code."""
    parser = Parser(prog="xattn bench generation", description=main.__doc__)
    parser.add_argument("overrides", nargs="*", help="overrides of the config, after backend.context_length=1024")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="number of timings of each")
    options = parser.parse_args(argv)
    config = compose(["backend.context_length=1024", *options.overrides])
    length = config.backend.context_length
    if options.prompt_tokens < 1 or options.max_tokens < 1 or options.prompt_tokens + options.max_tokens > length:
        parser.error(
            f"prompt and continuation must have at least one token each and at most context_length {length} together"
        )
    model = LanguageModel(config.model, config.backend, VOCAB_SIZE)
    hyper = hyperparameters(config).model
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, options.prompt_tokens)
    padded = jnp.zeros((1, length), jnp.int32).at[0, : len(prompt)].set(prompt)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    trained = TrainedModel(model, params, hyper)

    @jax.jit
    def forward(params: Any, tokens: jax.Array, known: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens, hyper)
        return logits[0, known - 1].argmax()

    def cached() -> int:
        sampling, key = Sampling(temperature=0.0), jax.random.key(0)
        return len(generate(trained, prompt, num_tokens=options.max_tokens, sampling=sampling, key=key))

    def without() -> int:
        tokens = padded
        for known in range(len(prompt), len(prompt) + FORWARDS):
            token = forward(params, tokens, jnp.int32(known))
            tokens = tokens.at[0, min(known, length - 1)].set(token)
        tokens.block_until_ready()
        return FORWARDS

    speeds: dict[str, list[float]] = {"cache": [], "forward": []}
    for turn in range(options.repeats + 1):
        for name, run in (("cache", cached), ("forward", without)):
            began = time.perf_counter()
            tokens = run()
            if turn:  # the first turn compiles
                speeds[name].append(tokens / (time.perf_counter() - began))
    cache, plain = statistics.median(speeds["cache"]), statistics.median(speeds["forward"])
    result = {
        "activation": config.backend.activation,
        "context_length": length,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
        "tokens_per_second": cache,
        "tokens_per_second_without_cache": plain,
        "ratio": cache / plain,
        "all": speeds,
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))
    return 0
