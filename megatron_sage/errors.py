"""What the command line turns into a single line, and the exit status of every way in which a run ends."""

FINISHED = 0
FAULT = 1  # a fault of the program, or of another rank: with a traceback
USER_ERROR = 2  # bad input, a run that stopped itself after saving, or memory that did not suffice
STALLED = 70  # a rank made no progress for training.stall_seconds (EX_SOFTWARE of sysexits.h)
STOPPED = 75  # by a signal, with the state saved: start it again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Bad input from a user: one line naming the key or file, the value, the rule it broke and the cure."""


class OutOfMemory(UserError):
    """The exception to the one line: what held the memory, and which settings would need less, line by line."""
