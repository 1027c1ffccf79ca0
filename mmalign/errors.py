"""Errors a user can act on. The command line prints them as sentences, never as tracebacks."""

from __future__ import annotations

from typing import Any


class MmalignError(Exception):
    """A problem the user can fix, told as: what, where, got, wanted, next move.

    Example: DataError("image cannot be read", where="row 12 (id coco-7), column images",
                       got="0 bytes", wanted="a JPEG or PNG", fix="delete the row or the file")
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        wanted: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.fix = what, where, got, wanted, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.got is not None:
            text += f"; got {self.got}"
        if self.wanted is not None:
            text += f"; wanted {self.wanted}"
        if self.fix:
            end = "" if self.fix.endswith("?") else "."
            text += f". {self.fix[0].upper()}{self.fix[1:]}{end}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle's own way calls the class, which in a subclass may want other arguments.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[MmalignError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(MmalignError):
    """A recipe, builder or eval config is wrong; carries all of a file's problems at once."""


class DataError(MmalignError):
    """A dataset, a row or a media file is wrong."""


class MediaError(DataError):
    """An image or clip cannot be read, or must not be."""


class SchemaMismatch(DataError):
    """A dataset lacks a column that a loss or a builder needs."""


class ModelError(MmalignError):
    """A checkpoint, processor or model family is wrong."""


class MissingExtra(MmalignError):
    """An optional package is not installed; the message holds the line that installs it."""


class EngineError(MmalignError):
    """The workers that a batch job runs on are not there, or died again and again."""


class TrainingError(MmalignError):
    """Training cannot go on: a non-finite loss, a reference that is not one, an unusable resume."""


class RewardError(MmalignError):
    """A reward function raised, or gave what is no finite number, for a row that is named."""
