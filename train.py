"""Train one stage: `python train.py configs/emoji/decoder.yaml [key=value ...]`, or under `accelerate launch`."""

import sys

from unclip.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
