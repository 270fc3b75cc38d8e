"""``python -m jmlr``: the same as the ``jmlr`` command."""

from jmlr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
