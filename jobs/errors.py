"""What the queue cannot do, and says to whoever asked."""

from __future__ import annotations


class JobError(Exception):
    """Whatever the queue cannot do. Arguments are kept as they are, since Ray pickles errors between processes."""


class JobNotFoundError(JobError):
    """No job, or more than one, has an id that starts so."""

    def __init__(self, wanted: str, matches: list[str]) -> None:
        super().__init__(wanted, matches)
        self.wanted, self.matches = wanted, matches

    def __str__(self) -> str:
        if self.matches:
            return f"{self.wanted!r} could be {', '.join(self.matches)}: give more of the id"
        return f"there is no job {self.wanted!r}: `python -m jobs list` shows the ids"


class TooManyJobsError(JobError):
    """A tenant has as many unfinished or waiting jobs as whoever submits another one, or a sweep of `new`, may have."""

    def __init__(self, most: int, what: str = "unfinished", new: int = 1) -> None:
        super().__init__(most, what, new)
        self.most, self.what, self.new = most, what, new

    def __str__(self) -> str:
        if self.new > 1:
            return f"there may be {self.most} {self.what} jobs, and the sweep has {self.new}; give it fewer, or wait"
        return f"there may be {self.most} {self.what} jobs; wait for one, or cancel one"


class DependencyError(JobError):
    """A job cannot wait for what it is to wait for: `problems`, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


class IllegalTransitionError(JobError):
    """A move that no state table lists."""

    def __init__(self, subject: str, from_: str, to: str) -> None:
        super().__init__(subject, from_, to)
        self.subject, self.from_, self.to = subject, from_, to

    def __str__(self) -> str:
        return f"{self.subject} is {self.from_} and cannot become {self.to}"


class DatabaseSettingError(JobError, ValueError):
    """LORA_DATABASE_URL names a database that this cannot use; the message says what to set."""


class UnstorableValueError(JobError):
    """No database column holds this value: text with the character NUL on PostgreSQL, or a number that is too large."""


class DatabaseUnavailableError(JobError):
    """The database did not answer. Whether the last write happened is unknown: read again."""
