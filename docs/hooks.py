"""What mkdocs needs beside its settings: figures from where they are made, and docstrings that say ">= 0"."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
EVERY = re.compile(r"^::: ([\w.]+)\.\*$", re.MULTILINE)
LOADED = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


class WithoutQuotes(Extension):
    """Docstrings say `k: >= 1`, which is no quotation."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Leave out the processor of lines that begin with >."""
        md.parser.blockprocessors.deregister("quote")


def on_config(config: Any) -> Any:
    """For the pages and for what mkdocstrings renders."""
    config.markdown_extensions.append(WithoutQuotes())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the figures that `benchmarks.report` draws, which its page shows as figures/NAME."""
    for path in sorted((ROOT / "benchmarks" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write `::: PACKAGE.*` out: an entry for each name in its `__all__`, from the file of that name if any."""
    return EVERY.sub(lambda match: "\n\n".join(f"::: {name}" for name in public_names(match[1])), markdown)


def public_names(package: str) -> list[str]:
    """Where each name in the `__all__` of a package is defined, as far as files tell; read from their text."""
    folder = ROOT / package.replace(".", "/")
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    names = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", text, re.MULTILINE | re.DOTALL)[1])
    return [f"{package}.{name}.{name}" if (folder / f"{name}.py").is_file() else f"{package}.{name}" for name in names]


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Raises: PluginError, a page that loads something from elsewhere."""
    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} must load nothing from elsewhere, got {found[0]}")
    return output
