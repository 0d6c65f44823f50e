"""The texts that reward models were trained on, from their authors' files at pinned versions.

A model that was fine-tuned on one exact prompt needs that prompt. The texts are other people's, so
they are not part of this project: a file is fetched on first use (or named by the user), its hash
is checked, and a string constant is read out of its syntax tree. Nothing is executed or installed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Template:
    """String constants of one file.

    Attributes:
        source: Who publishes it, for messages.
        url: Where it is fetched: the file, or a wheel (zip) that holds it.
        member: Path inside the wheel; empty if the URL is the file.
        sha256: Of the file.
        constants: Their names; the text is their concatenation.
    """

    source: str
    url: str
    member: str
    sha256: str
    constants: tuple[str, ...]


VIDEO_REWARD = Template(
    source="KwaiVGI/VideoAlign @ 219ab9db, prompt_template.py",
    url="https://raw.githubusercontent.com/KwaiVGI/VideoAlign/"
    "219ab9db64c045e5181a2202d11f686439351292/prompt_template.py",
    member="",
    sha256="8fb42f91fd7440a1c9a377e78f36d67da6132eb348f402eecbeb57e41f138ae9",
    constants=("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",),
)
HPSV3 = Template(
    source="hpsv3 1.0.0 on PyPI, hpsv3/dataset/data_collator_qwen.py",
    url="https://pypi.org/simple/hpsv3/",
    member="hpsv3/dataset/data_collator_qwen.py",
    sha256="b0f936e89f8df652c67d470412e1d9afd27aa711dec85724c19989ac91e7a3e3",
    constants=("INSTRUCTION", "prompt_with_special_token"),
)
_WHEEL = "hpsv3-1.0.0-py3-none-any.whl"
_LARGEST = 16 * 2**20  # Bytes read from a server.


def load_template(template: Template, file: str | Path | None = None) -> str:
    """The text of a template, with its `{text_prompt}`; see `load_source`."""
    source = load_source(template, file)
    return "".join(constant(source, name) for name in template.constants)


def load_source(template: Template, file: str | Path | None = None) -> str:
    """The file that holds a template; it is read and never run.

    Args:
        template: Which.
        file: The file itself or the wheel that holds it; None takes the cache, else fetches.

    Raises:
        ValueError: The file cannot be had, or is another version; the message names what to get.
    """
    cached = _cache() / f"{template.sha256[:16]}.txt"
    if file is not None:
        content = _read(Path(file), template)
    elif cached.is_file():
        content = cached.read_bytes()
    else:
        content = _fetch(template)
    found = hashlib.sha256(content).hexdigest()
    if found != template.sha256:
        where = str(file) if file is not None else template.url
        raise ValueError(
            f"{where} is another version (SHA-256 {found[:12]}..., expected "
            f"{template.sha256[:12]}... of {template.source}); give that file as options.template"
        )
    if file is None and not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(cached)
    return content.decode("utf-8")


def constant(source: str, name: str) -> str:
    """The string that is assigned to a name, the outermost first; implicit concatenation is one.

    Raises:
        ValueError: No such assignment of a plain string.
    """
    for node in ast.walk(ast.parse(source)):  # Breadth first: the module's own come first.
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
    raise ValueError(f"the template file assigns no plain string to {name}")


def fill(text: str, prompt: str) -> str:
    """The text with the prompt in its place; braces in the prompt stay as they are."""
    return text.format(text_prompt=prompt)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "dancegrpo_fast" / "templates"


def _read(path: Path, template: Template) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); give {template.source}"
        ) from None
    return _member(content, template) if zipfile.is_zipfile(io.BytesIO(content)) else content


def _member(wheel: bytes, template: Template) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        try:
            return archive.read(template.member)
        except KeyError:
            raise ValueError(f"the wheel holds no {template.member}") from None


def _fetch(template: Template) -> bytes:
    try:
        if not template.member:
            return _get(template.url)
        # A package index lists its files' addresses; only the wheel's name is ours to know.
        page = _get(template.url).decode("utf-8")
        link = next((part for part in page.split('"') if _WHEEL in part and "http" in part), None)
        if link is None:
            raise OSError(f"the index does not list {_WHEEL}")
        return _member(_get(link.partition("#")[0]), template)
    except OSError as error:
        raise ValueError(
            f"{template.url} cannot be fetched ({error}); put {template.source} on this machine "
            "and name it in options.template"
        ) from error


def _get(url: str) -> bytes:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise OSError("HF_HUB_OFFLINE is 1")
    with urllib.request.urlopen(url, timeout=30) as answer:
        content: bytes = answer.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(f"more than {_LARGEST} bytes")
    return content
