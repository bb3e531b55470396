"""`python -m varkd`: the command line."""

from varkd.cli import leave, main

if __name__ == "__main__":
    leave(main())
