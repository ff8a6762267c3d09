"""``python -m translution``: the command line, where its script is not on the path."""

from translution.cli import main

main()
