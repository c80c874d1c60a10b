"""How Sphinx builds these pages: `sphinx-build -W docs docs/_build`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sphinx.ext.napoleon import Config, GoogleDocstring

from shmstore import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "shmstore"
author = "shmstore contributors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"shmstore {__version__}"

# Every heading has an anchor, so that a link to one that is gone fails the build.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

_NAPOLEON = Config()


def setup(app: Sphinx) -> None:
    """Read docstrings as Google's, but for those of constants.

    Not sphinx.ext.napoleon as an extension: it takes what stands before a colon in a constant's
    docstring for a type.
    """
    app.connect("autodoc-process-docstring", _google)


def _google(*event: Any) -> None:  # the event has six arguments
    _, what, name, described, options, lines = event
    if what not in {"attribute", "data", "property"}:
        docstring = GoogleDocstring(lines, _NAPOLEON, None, what, name, described, options)
        lines[:] = docstring.lines()
