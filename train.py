"""Train a causal language model with the attention of your choice: ``python train.py backend.activation=sigmoid``."""

import sys

from xattn.system import entry

if __name__ == "__main__":
    entry.announce(sys.argv[1:])
    from xattn import main  # takes a second; the first line is on the screen before

    main()
