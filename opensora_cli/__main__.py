"""`python -m opensora_cli`, and what the `osora` script calls."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from opensora_cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while typer and rich are still being imported, or a second one while cleaning up
        sys.exit(130)


if __name__ == "__main__":
    main()
