"""`python -m dcompile` is the command line."""

from dcompile.cli import main

main()
