"""The operators as functions: fast ones and the slow reference."""
