"""`python -m wager` is the command `wager`."""

from wager.cli import main

main()
