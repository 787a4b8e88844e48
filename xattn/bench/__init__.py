"""Measurements of parts, side by side in one process; ``xattn bench``."""
