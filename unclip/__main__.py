"""`python -m unclip` is the command `unclip`."""

from .cli import main

if __name__ == "__main__":
    main()
