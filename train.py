"""Train one stage: `python train.py configs/emoji/decoder.yaml [key=value ...]`, or under `accelerate launch`."""

import sys

from unclip.config import ConfigError
from unclip.training import train

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: train.py CONFIG [key=value ...]")
    try:
        train(sys.argv[1], sys.argv[2:])
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
