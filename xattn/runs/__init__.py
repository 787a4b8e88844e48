"""A run: its folder, its provenance, and the session that trains it."""
