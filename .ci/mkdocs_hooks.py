"""What mkdocs.yml adds to the pages: equations, docstrings in the form that mkdocstrings expects, and no network."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.utils import get_relative_url

_log = get_plugin_logger("site")
_PACKAGE = Path(__file__).parents[1] / "lightning_ptq" / "__init__.py"
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^Example(::?)\n((?:\n| +.*\n?)+)", re.M)
_REMOTE = "https://unpkg.com/iframe-worker/shim"
"""The only file that the theme's plugin ``offline`` loads from the network."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``$$`` blocks and GitHub's inline math by MathML, which needs no script."""
    markdown = re.sub(
        r"^\$\$\n(.+?)\n\$\$$", lambda found: convert(found[1], display="block"), markdown, flags=re.M | re.S
    )
    # In a span, as Markdown takes a line that begins with <math> for a block.
    return re.sub(r"\$`(.+?)`\$", lambda found: f"<span>{convert(found[1])}</span>", markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Load the theme's one remote script from the site itself; warn of any other, which fails a strict build."""
    output = output.replace(_REMOTE, get_relative_url("assets/iframe-worker.js", page.url))
    for found in re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"(https?:[^\"]+)", output):
        _log.warning("%s loads %s; the site has to work without a network.", page.file.src_path, found)
    return output


def public_names() -> set[str]:
    """Return the names in ``lightning_ptq.__all__``, read without importing torch."""
    for node in ast.parse(_PACKAGE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise LookupError(f"{_PACKAGE} has no __all__")


def to_markdown(docstring: str, public: set[str]) -> str:
    """Return a docstring with roles as links to public names, or else as code, and examples as a section."""

    def link(found: re.Match[str]) -> str:
        *_, name = found[1].removeprefix("lightning_ptq.").split(".")
        return f"[`{name}`][lightning_ptq.{name}]" if name in public else f"`{name}`"

    def example(found: re.Match[str]) -> str:
        code = dedent(found[2]).strip("\n")
        if found[1] == "::":
            code = f"```python\n{code}\n```"
        return f"Examples:\n{indent(code, '    ')}\n"

    return _EXAMPLE.sub(example, _ROLE.sub(link, docstring).replace("``", "`"))


class Docstrings(griffe.Extension):
    """Converts every docstring of the package before it is parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.public = public_names()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, self.public)
