"""``python -m prgkit`` is ``prgkit``; torchrun needs it."""

from prgkit.cli import main

main()
