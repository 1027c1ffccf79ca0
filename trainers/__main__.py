"""`accelerate launch -m trainers RECIPE [key=value]...` is the same run as `mmalign train`."""

import sys

from mmalign.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
