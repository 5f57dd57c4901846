"""The two ways a command ends badly, each with its exit code (the contract in the README)."""


class UserError(Exception):
    """Bad config or input: one line that names the file, the key, what was found and what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that started and could not finish; what was saved is still there. Exit code 1."""
