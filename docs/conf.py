"""The documentation site: the repository's Markdown files, and the API from docstrings.

python -m sphinx -W -c docs . build/site
"""

import vadapter

project = "vadapter"
author = "the vadapter authors"
version = release = vadapter.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
# The source folder is the repository, so that links between the guides are the same in both.
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "BUILD_NOTES.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "launch/README.md",
    "docs/*.md",
    "docs/api/*.md",
    "vadapter/README.md",
    "vadapter/*/README.md",
    "vadapter/models/adapters/README.md",
    "vadapter/weights/packaged/README.md",
]
myst_heading_anchors = 4
myst_enable_extensions = ["fieldlist"]
suppress_warnings = ["myst.header"]  # a guide that starts below its first level

default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"vadapter {version}"


def literal_tables(app, what, name, obj, options, lines):
    """Show the indented tables of a module's docstring as they are written."""
    if what != "module":
        return
    shown, inside = [], False
    for line in lines:
        indented = line.startswith("  ")
        if indented and not inside:
            shown += [".. code-block:: text", ""]
        if line.strip():
            inside = indented
        shown.append(f"    {line}" if indented else line)
    lines[:] = shown


def setup(app):
    """Register the hook."""
    app.connect("autodoc-process-docstring", literal_tables)
