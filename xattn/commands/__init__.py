"""The commands of ``xattn``, a module each; :mod:`xattn.cli` lists them."""
