"""Vision transformer and language model, built from a spec or loaded from a file."""
