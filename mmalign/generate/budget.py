"""What may be spent on a server: a ledger of what was paid for, and caps on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmalign.errors import ConfigError, ModelError
from mmalign.generate.chat import Ask
from mmalign.generate.ledger import Answer, Ledger


class BudgetReached(ModelError):
    """A cap was reached; what was answered is in the ledger."""


class Account:
    """The ledger, and what may still be spent by it; without a ledger, no cap and no memory.

    Caps count what the ledger holds for `model`. Raises ConfigError for caps without a ledger.
    """

    def __init__(
        self,
        ledger: Path | None,
        *,
        model: str,
        max_requests: int | None = None,
        max_total_tokens: int | None = None,
    ) -> None:
        if ledger is None and (max_requests or max_total_tokens):
            raise ConfigError(
                "a budget needs a ledger, which keeps what was paid for",
                where=f"server:{model}",
                fix="name a file for it: ledger",
            )
        self.ledger = None if ledger is None else Ledger(ledger)
        self.model = model
        self.max_requests, self.max_total_tokens = max_requests, max_total_tokens
        self._lock = threading.Lock()
        self._on_their_way = 0

    def known(self, key: str) -> Answer | None:
        """The answer to a request that was paid for."""
        return self.ledger.get(key) if self.ledger is not None else None

    @contextmanager
    def reserved(self) -> Iterator[Callable[[Ask, Answer], None]]:
        """A place in the budget for one request; yields what books its answer.

        Raises BudgetReached where there is none left.
        """
        with self._lock:
            self._check()
            self._on_their_way += 1
        answered = False

        def book(ask: Ask, answer: Answer) -> None:
            nonlocal answered
            if self.ledger is not None:
                # Under one lock with the count of those on their way, so that none counts twice.
                with self._lock:
                    self.ledger.add(ask.key, answer, model=self.model, request_id=ask.id)
                    self._on_their_way -= 1
                    answered = True

        try:
            yield book
        finally:
            if not answered:
                with self._lock:
                    self._on_their_way -= 1

    def _check(self) -> None:
        if self.ledger is None:
            return
        spent = self.ledger.spent(self.model)
        for name, used, cap in (
            ("max_requests", spent.num_answers + self._on_their_way, self.max_requests),
            ("max_total_tokens", spent.num_tokens, self.max_total_tokens),
        ):
            if cap is not None and used >= cap:
                raise BudgetReached(
                    f"the budget of {name} is reached; what was answered is kept",
                    where=str(self.ledger.path),
                    got=used,
                    wanted=f"less than {cap}",
                    fix=f"raise {name} and start again to go on from there",
                )
