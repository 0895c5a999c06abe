"""`python -m opensora_cli`, and what the `osora` script calls."""

from __future__ import annotations

import gc
import os
import sys
import warnings

# the console shows progress and says what matters; whoever wants to hear the libraries sets these, or says --debug
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main() -> None:
    """Run the command line and exit with its code."""
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    # OpenMP threads that wait by spinning take the cores from each other, and a run beside another slows tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from opensora_cli import launch

        launch.enter_rank()
        from opensora_cli.app import run

        code = run(sys.argv[1:])
        launch.leave_rank(code)
        gc.freeze()  # what lives until the end need not be searched for garbage there: torch alone takes half a second
        sys.exit(code)
    except KeyboardInterrupt:  # while typer and rich are still being imported, or a second one while cleaning up
        sys.exit(130)


if __name__ == "__main__":
    main()
