"""An attention of your own without a fork: ReLU divided by the sequence length (Wortsman et al., arXiv 2309.08586).

    python examples/own_activation.py backend.activation=relu trainer=debug
    python examples/own_activation.py -m backend.activation=softmax,relu seed=0,1,2 study=relu
    python examples/own_activation.py sample outputs/relu/relu-…
    xattn report outputs/relu

This file does all that train.py and the xattn command do, with one more activation to choose.
To see that yours is computed correctly everywhere: xattn.testing.check_activation("relu").
"""

import jax
import jax.numpy as jnp

from xattn import main
from xattn.backend import register_activation


@register_activation("relu", formula="max(A, 0) / n")
def relu(logits: jax.Array, n: int) -> jax.Array:
    """Return the weights. The float32 logits A have any shape; n is the sequence length of training."""
    return jnp.maximum(logits, 0) / n


if __name__ == "__main__":
    main()
