"""``python -m translution.cli``, which DeepSpeed's launcher starts on every rank."""

from . import main

main()
