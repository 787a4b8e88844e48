"""``xattn bench gpu``: everything that only a GPU can show, in one command and ten minutes."""
