"""Several generators in one build, of which one at a time is in this process's memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping

from data_builders.base import AnyGenerator, GeneratorConfig
from mmalign.generate.base import Generator


class InTurn:
    """Generators by name: those given, and those that are loaded from their config when asked for.

    A local model leaves the memory before another is loaded, unless both names mean the same one.
    Servers take no memory here, and stay.
    """

    def __init__(
        self,
        configs: Mapping[str, AnyGenerator] | None = None,
        *,
        given: Mapping[str, Generator] | None = None,
    ) -> None:
        self._configs, self._kept = dict(configs or {}), dict(given or {})
        self._local: tuple[str, Generator] | None = None

    def get(self, name: str) -> Generator:
        """The generator; hold it no longer than the work takes, so that it can leave."""
        if name in self._kept:
            return self._kept[name]
        config = self._configs[name]
        if not isinstance(config, GeneratorConfig):
            self._kept[name] = config.load()
            return self._kept[name]
        key = _model(config)
        if self._local is None or self._local[0] != key:
            self._release()
            self._local = (key, config.load())
        return self._local[1]

    def loaded_first(self, names: Iterable[str]) -> list[str]:
        """The names in an order that begins with what is in memory: a load less."""
        return sorted(names, key=lambda name: not self._is_loaded(name))

    def _is_loaded(self, name: str) -> bool:
        config = self._configs.get(name)
        if not isinstance(config, GeneratorConfig):
            return False
        return self._local is not None and self._local[0] == _model(config)

    def _release(self) -> None:
        if self._local is None:
            return
        self._local = None
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # Does nothing where CUDA was never used.


def _model(config: GeneratorConfig) -> str:
    """What tells two loaded models apart; how they decode is told at every call."""
    return repr((config.model, config.batch_size))
