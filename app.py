"""A page to draw with: `python app.py`, then open the address that it prints."""

import sys

from unclip.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()
