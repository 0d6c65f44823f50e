"""Runs a host's training script with our functions in the place of its own; no edit.

    python -m dancegrpo_fast.integrations.run [--host NAME] SCRIPT [ARGUMENTS]
    torchrun --nproc_per_node 8 -m dancegrpo_fast.integrations.run SCRIPT [ARGUMENTS]

A script runs as `__main__` and holds its own copy of what it defines or imports by name, which
nobody outside can rebind. So modules of the host are patched the moment they are executed, before
the script takes names from them; and behind a function that the script itself defines, the line
that imports ours is put, at the end of the function's last line (line numbers stay). What was
patched is said on stderr. Without --host the hosts are recognised by their functions.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import io
import os
import pkgutil
import sys
import types
from collections.abc import Iterable, Sequence

from dancegrpo_fast.integrations.patching import Patch, install, installed

_NO_HOSTS = {"common", "diffusers", "exact", "pairs", "patching", "run", "tables"}
_FOLDER = os.path.dirname(os.path.abspath(__file__))
HOSTS = tuple(sorted({found.name for found in pkgutil.iter_modules([_FOLDER])} - _NO_HOSTS))


class NothingToPatch(ValueError):
    """The script or the host has not what was to be replaced."""


def patches_of(hosts: Iterable[str]) -> tuple[Patch, ...]:
    """What the integrations of these hosts replace; a host that is configured has no patches."""
    modules = [importlib.import_module(f"dancegrpo_fast.integrations.{host}") for host in hosts]
    return tuple(patch for module in modules for patch in getattr(module, "PATCHES", ()))


def rebound(source: str, path: str, patches: Sequence[Patch]) -> tuple[ast.Module, list[Patch]]:
    """A script with ours imported behind each function of the same name that it defines.

    A function whose arguments are not the first of ours is another one, and stays.

    Args:
        source: The script's text.
        path: For errors.
        patches: Those without a module are looked for.

    Returns:
        The syntax tree, and the patches that found their function.
    """
    tree = ast.parse(source, path)
    wanted = {patch.name: patch for patch in patches if patch.module is None}
    body: list[ast.stmt] = []
    found = []
    for statement in tree.body:
        body.append(statement)
        if not isinstance(statement, ast.FunctionDef) or statement.name not in wanted:
            continue
        patch = wanted[statement.name]
        ours = patch.replacement
        names = [argument.arg for argument in statement.args.args]
        if names != list(inspect.signature(ours).parameters)[: len(names)]:
            print(f"dancegrpo_fast: left alone {path}: {patch.name}({', '.join(names)}), whose "
                  "arguments are others than ours", file=sys.stderr)  # fmt: skip
            continue
        line = f"from {ours.__module__} import {ours.__name__} as {patch.name}"
        (new,) = ast.parse(line).body
        for node in ast.walk(new):
            ast.copy_location(node, statement)
        body.append(new)
        found.append(patch)
    tree.body = body
    return tree, found


def run_script(path: str, arguments: Sequence[str], patches: Sequence[Patch]) -> None:
    """Runs a script as `python SCRIPT ARGUMENTS` would, with the patches.

    Raises:
        NothingToPatch: The script defines none of the functions and no module of the host can be
            found, or the script ended without importing one that was patched.
    """
    with io.open_code(os.path.abspath(path)) as file:
        source = file.read().decode("utf-8")
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(path))
    tree, found = rebound(source, path, patches)
    elsewhere = [patch for patch in patches if patch.module is not None]
    if not found and not any(_there(patch) for patch in elsewhere):
        names = ", ".join(map(str, patches)) or "(this host is configured: see its file)"
        raise NothingToPatch(f"nothing to patch for {path}: found none of {names}")
    for patch in found:
        print(f"dancegrpo_fast: patched {path}: {patch.name}", file=sys.stderr)
    install(elsewhere)
    # As runpy.run_path does for run_name="__main__", but from our tree.
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
    sys.modules["__main__"] = main
    exec(compile(tree, path, "exec", dont_inherit=True), main.__dict__)
    if not found and not any(patch in installed() for patch in elsewhere):
        names = ", ".join(map(str, elsewhere))
        raise NothingToPatch(f"{path} ended without importing any of {names}")


def _there(patch: Patch) -> bool:
    """Whether the top package of a host's module can be found; imports nothing."""
    assert patch.module is not None
    return importlib.util.find_spec(patch.module.split(".")[0]) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dancegrpo_fast.integrations.run", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--host", choices=HOSTS, help="patch this host's functions only")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        hosts = HOSTS if options.host is None else (options.host,)
        run_script(options.script, options.arguments, patches_of(hosts))
    except NothingToPatch as error:
        print(f"dancegrpo_fast: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
