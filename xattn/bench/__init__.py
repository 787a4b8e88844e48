"""``xattn bench``: measurements of parts, side by side in one process."""
