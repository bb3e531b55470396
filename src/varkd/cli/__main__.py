"""`python -m varkd.cli` (under torchrun): the same as `varkd`."""

from varkd.cli import leave, main

if __name__ == "__main__":
    leave(main())
