"""python -m rlalign is the command line."""

from rlalign.cli import main

main()
