"""The one exception that the command line turns into a single line."""


class UserError(Exception):
    """Bad input from a user: one line naming the key or file, the value, the rule it broke and the cure."""
