"""The exceptions that end a command: a mistake of the user, or a request to stop."""

EXIT_REQUEUE = 75  # exit code after SIGTERM, SIGUSR1 or SIGHUP: sysexits.h's EX_TEMPFAIL, "try again later"
EXIT_INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


class UserError(Exception):
    """A mistake that the user can fix. Commands print it as one sentence without a traceback; exit code 2."""


class Stopped(SystemExit):
    """Training was asked to stop and has saved its state. `code` is EXIT_REQUEUE or EXIT_INTERRUPTED."""
