"""The commands of ``xattn``, one module each; :mod:`xattn.cli` lists them."""
