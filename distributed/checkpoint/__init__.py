"""Checkpoints: saved, loaded, resharded and exported."""
