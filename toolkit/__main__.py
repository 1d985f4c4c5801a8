"""``python -m prgkit`` is ``prgkit``; torchrun needs it."""

from prgkit.cli.main import main

main()
