"""`python -m mmalign` is the command `mmalign`."""

from mmalign.cli import main

if __name__ == "__main__":
    main()
