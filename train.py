"""Trains a causal language model on the attention of your choice: ``python train.py backend.activation=sigmoid``."""

from xattn import main

if __name__ == "__main__":
    main()
