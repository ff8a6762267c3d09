"""The plan: how it is built, checked, written to a folder and read back."""
