"""``python -m translution.cli``, which DeepSpeed's launcher starts on every rank."""

from ..cli import main

main()
