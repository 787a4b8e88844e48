"""``xattn report``, ``xattn verdict`` and ``xattn compare``: what a study's run folders show, with its uncertainty.

Reads run folders only: no jax, no wandb, no network.
"""
