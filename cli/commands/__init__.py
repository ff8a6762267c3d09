"""One module per command: its signature and what it prints."""
