"""Tables that several commands print, or that one command prints several of."""

__all__: list[str] = []
