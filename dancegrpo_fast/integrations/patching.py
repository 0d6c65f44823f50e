"""Putting our functions in the place of a host's, wherever the host defines them.

Host scripts do `from package.module import function`: the name must be ours before that line runs.
`install` rebinds modules that are already imported, with every copy of the function that other
modules hold, and waits for the others: they are rebound the moment they have been executed.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple


class Patch(NamedTuple):
    """One function of a host.

    Attributes:
        module: Where the host defines it; None: in the script that is run.
        name: Its name there, "function" or "Class.method".
        replacement: Ours.
    """

    module: str | None
    name: str
    replacement: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.module or 'the script'}: {self.name}"


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module that waits for a patch, and patches it once it ran."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Patch]] = {}
        self.done: list[Patch] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            # On the object: the loader keeps its class, which tools look at.
            spec.loader.exec_module = functools.partial(self._execute, run)  # type: ignore[method-assign]
        return spec

    def _execute(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        run(module)
        for patch in self.waiting.pop(module.__name__, ()):
            self.apply(module, patch)

    def apply(self, module: ModuleType, patch: Patch) -> None:
        """Rebinds in its module, and in those that hold the function under any name."""
        *classes, name = patch.name.split(".")
        owner: Any = module
        for part in classes:
            owner = getattr(owner, part, None)
        original = getattr(owner, name, None)
        if original is None:
            raise AttributeError(
                f"{patch.module} has no {patch.name}: this version of the host is another than "
                "the one this integration was written for"
            )
        setattr(owner, name, patch.replacement)
        if not classes:
            for other in list(sys.modules.values()):
                held = getattr(other, "__dict__", {})
                for key in [key for key, value in held.items() if value is original]:
                    held[key] = patch.replacement
        self.done.append(patch)
        print(f"dancegrpo_fast: patched {patch}", file=sys.stderr)


_FINDER = _Finder()


def install(patches: Iterable[Patch]) -> None:
    """Patches modules of a host that are imported, now, and the others as soon as they are.

    Says on stderr what was patched, when it is. Patches without a module belong to scripts: `run`.

    Raises:
        AttributeError: A module that is imported has not the function.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for patch in patches:
        if patch.module is None or patch in _FINDER.done:
            continue
        module = sys.modules.get(patch.module)
        if module is not None:
            _FINDER.apply(module, patch)
        elif patch not in _FINDER.waiting.setdefault(patch.module, []):
            _FINDER.waiting[patch.module].append(patch)


def installed() -> tuple[Patch, ...]:
    """What has been patched so far."""
    return tuple(_FINDER.done)
