"""What a person at a terminal sees of an error, a warning and of libraries' own chatter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
SIGNAL_EXIT = 128  # plus the signal's number, as shells count


def run_for_person(action: Callable[[], Any], *, program: str, debug: bool = False) -> int:
    """Run ``action``; a mistake in what was given becomes one message and exit code 2.

    Wrong settings, data, models and folders are ValueError, OSError or ImportError here,
    RewardError says that the user's reward failed, NonFiniteError that training went astray, and
    two more that RLHF_KERNELS_BACKEND names a backend that cannot do the work.
    Anything else is a defect of this program and keeps its traceback, as all do with ``debug``.
    """
    from rlhf.engine import Interrupted, NonFiniteError, World
    from rlhf.ppo import RewardError
    from rlhf_kernels import BackendUnavailableError, UnsupportedOperationError

    foreseen = (NonFiniteError, RewardError, BackendUnavailableError, UnsupportedOperationError)
    try:
        action()
    except Interrupted as stop:
        if World().is_main:  # once, and not from every rank
            print(f"{program}: {stop}", file=sys.stderr)
        return SIGNAL_EXIT + stop.signal_number
    except KeyboardInterrupt:
        print(f"{program}: stopped by the keyboard", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, *foreseen) as error:
        if debug:
            raise
        print(f"{program}: error: {error}", file=sys.stderr)
        print("(--debug shows where in the code it happened)", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def quiet_libraries() -> None:
    """Hide the loading bars of transformers and datasets, and print warnings as one line."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = "" if issubclass(category, UserWarning) else f" ({filename}:{lineno})"
    print(f"note: {message}{where}", file=sys.stderr)
