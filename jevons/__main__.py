"""`python -m jevons`, and `torchrun -m jevons`."""

from jevons.cli import main

main()
