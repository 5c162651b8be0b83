"""The command line: list, fetch, init, card, plan, run, compare, try, report, export, verify, pay, audit, and more.

Nothing heavy is imported until a command needs it, so that ``lichen --help`` answers at once. Results
go to standard output, everything else to standard error. Exit codes: 0 done, 1 a fault of lichen
itself or a method of a comparison that failed, 2 bad input or a machine that refuses, 3 a run that learned nothing,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter

from lichen import __version__
from lichen.cli_audit import audit_command, influence_command, split_audit_command
from lichen.cli_cache import cache_command
from lichen.cli_card import card_command
from lichen.cli_compare import compare_command
from lichen.cli_export import export_command
from lichen.cli_federation import federation_app
from lichen.cli_forget import forget_command
from lichen.cli_init import init_command
from lichen.cli_join import join_command, worker_command
from lichen.cli_look import fetch_command, list_command, report_command, try_command
from lichen.cli_offsite import emulate_command, plug_command
from lichen.cli_owners import claim_command, fingerprint_command, pay_command
from lichen.cli_rebase import rebase_command
from lichen.cli_run import node_command, piece_command, plan_command, rank_command, run_command
from lichen.cli_serve import serve_command, status_command, stop_command, submit_command
from lichen.cli_verify import verify_command
from lichen.cli_withdraw import withdraw_command
from lichen.core.children import end_with_parent
from lichen.core.errors import LichenError
from lichen.shell import crash, forget_output, log, prepare_streams, writing

__all__ = ["app", "main"]

app = App(
    name="lichen",
    help="Federated learning and foundation models, each making the other better.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=""),
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_command,
    "fetch": fetch_command,
    "init": init_command,
    "card": card_command,
    "plan": plan_command,
    "run": run_command,
    "compare": compare_command,
    "try": try_command,
    "report": report_command,
    "export": export_command,
    "rebase": rebase_command,
    "emulate": emulate_command,
    "plug": plug_command,
    "forget": forget_command,
    "verify": verify_command,
    "pay": pay_command,
    "fingerprint": fingerprint_command,
    "claim": claim_command,
    "audit": audit_command,
    "split-audit": split_audit_command,
    "influence": influence_command,
    "cache": cache_command,
    "serve": serve_command,
    "join": join_command,
    "submit": submit_command,
    "status": status_command,
    "stop": stop_command,
    "withdraw": withdraw_command,
}
for _name, _command in _COMMANDS.items():
    app.command(_command, name=_name)
app.command(federation_app)
app.command(node_command, name="node", show=False)
app.command(rank_command, name="rank", show=False)
app.command(piece_command, name="piece", show=False)
app.command(worker_command, name="worker", show=False)

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How threads wait for one another, where the user has said it."""

_TRAINING = ("run", "plan", "compare", "rebase", "emulate", "forget", "node", "rank")
"""Commands whose process is worth setting up for large tensors."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after ``lichen``; those of the process if None.

    Returns:
        The exit code.
    """
    # Libraries read these when they are imported: no bars over our own progress, nothing sent home.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a home that cannot be written, and goes on
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if arguments is None:
        end_with_parent()
        prepare_streams()
    if arguments is None and sys.argv[1:2] and sys.argv[1] in _TRAINING:
        from lichen.allocator import keep_large_buffers

        keep_large_buffers()
        if not any(name in os.environ for name in _WAITING):
            # Threads that spin for long take the core from those they wait for, wherever a machine has other work;
            # threads that sleep at once are woken late. benchmarks/neighbour.md
            os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        app(
            sys.argv[1:] if arguments is None else list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        with writing():
            sys.stdout.flush()
    except LichenError as error:
        log(str(error))
        return 2
    except CycloptsError as error:
        log(f"{error}\n  fix: see lichen --help")
        return 2
    except KeyboardInterrupt:
        log("\nstopped")
        return 130
    except BrokenPipeError:
        # The reader left; nothing more may be written, not even by the interpreter's last flush.
        forget_output()
        return 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0
    except Exception as error:
        return crash(error, None)
    return 0
