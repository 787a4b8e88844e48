"""Trains a causal language model on the attention of your choice: ``python train.py backend.activation=sigmoid``."""

import sys

from xattn.system import entry

if __name__ == "__main__":
    entry.announce(sys.argv[1:])
    from xattn import main  # a second of imports, before which the first line is on the screen

    main()
