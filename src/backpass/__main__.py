"""``python -m backpass``: the command line."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the current folder first, where a file such as jinja2.py would hide a package.
    if not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() == Path.cwd():
        sys.path.append(sys.path.pop(0))
    from backpass.cli import main

    main()
