"""Reads a recipe with its overrides, and writes one.

YAML here is YAML 1.2's core schema: `no`, `on` and `2024-01-01` are text, `1e-4` is a number and
`012` is twelve (PyYAML alone follows YAML 1.1, where each of them is something else).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dancegrpo_fast.config.agreement import (
    ONLY_WITH,
    Disagreement,
    NotValid,
    disagreements,
    show,
)
from dancegrpo_fast.config.errors import UserError
from dancegrpo_fast.config.presets import with_preset
from dancegrpo_fast.config.run import RunConfig, default_at, field_at, section_at
from dancegrpo_fast.config.section import Section


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _tag, _regexp = f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(_tag, _regexp, _first)
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda _, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe and applies `dotted.key=value` overrides, the last of a key winning.

    A value is written as in YAML; a list index is a key (`rewards.0.weight=2`); a list given whole
    replaces the list. Relative paths stay as written: they count from the working directory.

    Raises:
        UserError: One line per problem, all of them together.
    """
    lines: list[str] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 recipe file: {error}") from None
    try:
        raw = _parse(text, str(path), lines)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        known = ", ".join(RunConfig.model_fields)
        raise UserError(f"{path}: must hold sections (key: value lines) with the keys {known}")
    overridden: set[str] = set()
    for override in overrides:
        try:
            overridden.add(_apply(raw, override, lines))
        except (yaml.YAMLError, ValueError) as error:
            lines.append(f"override: {override}: {_one_line(error)}")

    raw, from_preset = with_preset(raw, ONLY_WITH)

    def source(path_: str) -> str:
        if path_ in from_preset:
            return f"algorithm {raw['algorithm']}"
        return "override" if any(_within(path_, key) for key in overridden) else str(path)

    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        lines += (f"{source(at)}: {line}" for at, line in _explain(raw, error))
    if lines:
        raise UserError("\n".join(lines))
    return config


def dump(config: RunConfig) -> str:
    """Returns the whole configuration as YAML; `load_config` reads it back to an equal one."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_value(text: str, source: str) -> Any:
    """Returns a value that is written as in a recipe.

    Raises:
        UserError: It is no YAML, or gives a key twice; `source` says where it stands.
    """
    lines: list[str] = []
    try:
        value = _parse(text, source, lines)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source} = {text!r}: {_one_line(error)}") from None
    if lines:
        raise UserError("\n".join(lines))
    return value


def _parse(text: str, source: str, lines: list[str], *, prefix: str = "") -> Any:
    """Returns the document; appends a line to `lines` for each key that is given twice."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        for at, first, second in _duplicates(root, prefix):
            lines.append(
                f"{source}: {at}: given twice, on lines {first} and {second}; keep one of them"
            )
        return _unshared(loader.construct_document(root))
    except RecursionError:
        raise ValueError("is nested too deeply to be a recipe") from None
    except (KeyError, AttributeError, IndexError, TypeError):  # PyYAML's, of a value beside a tag.
        raise ValueError("a value does not fit the !!tag before it; leave the tag out") from None
    finally:
        loader.dispose()


def _unshared(value: Any) -> Any:
    """Copies what an alias shares: an override of one place must not change the other."""
    if isinstance(value, dict):
        return {str(key): _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _duplicates(
    node: yaml.Node, path: str, above: tuple[int, ...] = ()
) -> Iterator[tuple[str, int, int]]:
    """Yields (path, first line, second line) of every repeated key."""
    if id(node) in above:
        raise ValueError(f"line {node.start_mark.line + 1}: holds an alias to itself; write it out")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, f"{path}{index}.", above)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key must be plain text")
            if name in first:
                yield path + name, first[name], line
            first.setdefault(name, line)
            yield from _duplicates(value, f"{path}{name}.", above)


def _apply(raw: dict[str, Any], override: str, lines: list[str]) -> str:
    """Sets one `key=value` in `raw` and returns the key."""
    path, equals, text = (part.strip() for part in override.partition("="))
    if not (path and equals):
        raise ValueError("write it as key=value, such as rollout.steps=8")
    if not text:
        raise ValueError(f"has no value; write {path}=null for none or {path}='' for empty text")
    keys = path.split(".")
    if not all(keys):
        raise ValueError("has an empty key; write it as key=value, such as rollout.steps=8")
    value = _parse(text, "override", lines, prefix=f"{path}.")
    target: Any = raw
    for depth, key in enumerate(keys):
        here, last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(target, list):
            if not (key.isdecimal() and int(key) < len(target)):
                raise ValueError(f"{here} holds {len(target)}, counted from 0; there is no {key}")
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
            if not last and target.get(key) is None:
                if keys[depth + 1].isdecimal():
                    found = ".".join(keys[: depth + 1])
                    raise ValueError(f"{found} is no list in the recipe; give the whole list")
                target[key] = {}
        else:
            raise ValueError(f"{here} = {show(target)} has no keys; set {here} itself")
        if last:
            target[index] = value
        else:
            target = target[index]
    return path


_MISSING = object()


def _explain(raw: dict[str, Any], error: ValidationError) -> Iterator[Disagreement]:
    """Yields (path, line) for every problem of `raw`."""
    faulty: set[str] = set()
    for detail in error.errors():
        path = ".".join(map(str, detail["loc"]))
        if not path:  # RunConfig._fields_agree, asked again below
            continue
        dotted = detail["type"] == "extra_forbidden" and "." in str(detail["loc"][-1])
        if dotted:
            reason, related = "is no key: dots are for overrides; write sections with keys", None
        else:
            reason, related = _reason(path, detail)
        faulty |= {path, related or path}
        shown = "" if detail["type"] == "missing" else f" = {show(detail['input'])}"
        yield path, f"{path}{shown}: {reason}"

    def get(path: str) -> Any:
        if any(_within(path, bad) or _within(bad, path) for bad in faulty):
            raise NotValid(path)
        value: Any = raw
        for key in path.split("."):
            value = value.get(key, _MISSING)
            if value is _MISSING:
                return default_at(path)
        return value

    for path, reason in disagreements(get, default_at):
        yield path, f"{path} = {show(get(path))}: {reason}"


def _reason(path: str, detail: ErrorDetails) -> tuple[str, str | None]:
    """Returns what is wrong and, for an unknown key, the path that was probably meant."""
    kind, reason = detail["type"], detail["msg"].replace("Input should be", "must be")
    *parents, key = path.split(".")
    if kind == "extra_forbidden":
        known = list(section_at(parents).model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        meant = [".".join((*parents, near[0]))] if near else []
        meant += [leaf for leaf in _leaves(RunConfig) if leaf.rpartition(".")[2] == key]
        if meant:
            return f"unknown key; did you mean {meant[0]}?", meant[0]
        return f"unknown key; known here: {', '.join(known)}", None
    if kind == "missing":
        return f"is missing; {_about(path)}", None
    if kind == "literal_error" and isinstance(detail["input"], str):
        choices = re.findall(r"'([^']*)'", reason)  # Also of a list's items.
        near = difflib.get_close_matches(detail["input"], choices, n=1)
        return f"{reason}; did you mean {near[0]}?" if near else reason, None
    better = {
        "bool_type": "must be true or false",
        "string_type": "must be text; put quotes around it",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "list_type": "must be a list, such as [a, b]",
        "model_type": "must be a section, key: value lines",
    }
    return better.get(kind, reason.removeprefix("Value error, ")), None


def _about(path: str) -> str:
    """Returns what to write at a path where nothing stands."""
    key = path.rpartition(".")[2]
    if key.isdecimal():
        return "add an item"
    annotation, description = field_at(path).annotation, field_at(path).description
    if isinstance(annotation, type) and issubclass(annotation, Section):
        required = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return f"its required keys: {', '.join(required)}"
    return description or "add it"


def _leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _leaves(field.annotation, f"{prefix}{key}.")
        else:
            yield prefix + key


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = error.problem or error.context
        return f"line {error.problem_mark.line + 1}: not valid YAML: {problem}"
    return " ".join(str(error).split())
