"""``python -m backpass``: the command line."""

from backpass.cli import main

if __name__ == "__main__":
    main()
