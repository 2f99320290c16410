"""Everything multum raises on purpose, in one place.

A `MultumError` is meant for the person at the keyboard: its text says what is wrong and what would be right. The command
line prints it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class MultumError(Exception):
    """Base of all errors that multum raises on purpose."""

    exit_code = 2


class InputError(MultumError):
    """The user's input is wrong. Takes every problem found, not only the first one.

    >>> str(InputError("no such file: a.csv"))
    'no such file: a.csv'
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise ValueError("an InputError needs at least one problem")
        self.problems = problems
        if len(problems) == 1:
            text = problems[0]
        else:
            text = f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(text)


class MissingExtra(MultumError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'multum[{extra}]'")


class ParityError(MultumError):
    """An exported model does not answer like the model it was exported from."""


class BudgetNotMet(MultumError):
    """No model within the budget was found. The best one found is saved and named in the text."""

    exit_code = 1
