"""The exceptions that end a command (a mistake of the user, a request to stop), and how they quote values."""

import errno
import reprlib

EXIT_REQUEUE = 75  # exit code after SIGTERM, SIGUSR1 or SIGHUP: sysexits.h's EX_TEMPFAIL, "try again later"
EXIT_INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


class UserError(Exception):
    """A mistake that the user can fix. Commands print `error: MESSAGE` and `hint: HINT`, no traceback; exit code 2.

    `str(error)` is one sentence, "MESSAGE: HINT.".

    Args:
        message: what is wrong, with the file, key or option. No period at its end.
        hint: what to do, in the imperative; or "did you mean X?".
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _without_period(message)
        self.hint = None if hint is None else _without_period(hint)
        super().__init__(self.message)  # pickle passes this on, and `hint` with the other attributes

    def prefixed(self, start: str) -> "UserError":
        """The same error with a start that says where it was found."""
        return UserError(f"{start}{self.message}", hint=self.hint)

    def __str__(self) -> str:
        sentence = self.message if self.hint is None else f"{self.message}: {self.hint}"
        return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


class Stopped(SystemExit):
    """Training was asked to stop and has saved its state. `code` is EXIT_REQUEUE or EXIT_INTERRUPTED."""


# Words of torch's and Python's errors where memory is short. CUDA's have a class of their own, with such a text.
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED", "bad_alloc", "start new thread")
# All that oneDNN says where it has no memory for its machine code or its buffers.
NO_MEMORY_OF_ONEDNN = ("could not create a primitive", "could not create a memory object")
LONGEST_QUOTE = 200  # characters of a value, or of another library's message, within a message


class _ShortRepr(reprlib.Repr):
    """repr() that looks at the first items and levels only: a value of a few bytes can have an endless repr."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 20
        self.maxstring = self.maxother = LONGEST_QUOTE

    def repr_int(self, x: int, level: int) -> str:
        return f"a number of {x.bit_length()} bits" if x.bit_length() > 1000 else repr(x)  # Python limits the digits


_short_repr = _ShortRepr()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a GPU did not suffice. No file and no value is to blame for that."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        text = str(error)
        return text in NO_MEMORY_OF_ONEDNN or any(words in text for words in NO_MEMORY)
    return isinstance(error, MemoryError)


def quote(value: object) -> str:
    """The repr of a value from a file or a command line, for a message: at most 200 characters, all printable."""
    return _cut(_short_repr.repr(value))


def in_short(reason: object) -> str:
    """An error's text, or a key, on one line, for a message: at most 200 characters."""
    return _cut(" ".join(str(reason).split()))


def _without_period(text: str) -> str:
    """The text of another library may end in a period, and one that was cut ends in three."""
    return text if text.endswith("...") else text.rstrip().removesuffix(".")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."
