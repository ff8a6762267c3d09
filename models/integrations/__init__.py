"""Other libraries' networks: replace their attention, read their tables."""
