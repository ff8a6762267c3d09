"""A rank's life replayed without values: every allocation and release, from init to resume."""
