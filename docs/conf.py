"""Sphinx's settings. `make docs` builds the site under build/docs; nothing of it is committed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # `benchmarks`; `reference_pages` beside this file

import mpsearch  # noqa: E402

project = "mpsearch"
author = "The mpsearch maintainers"
copyright = author
version = release = mpsearch.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "reference_pages",
]
exclude_patterns = ["gallery/*", "README.md"]
default_role = "code"  # one backtick in a docstring is a name

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

napoleon_use_ivar = True  # attributes once, where a docstring lists them
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
python_use_unqualified_type_names = True
python_display_short_literal_types = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": r"\.py$",  # every example is executed
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 5,
    "remove_config_comments": True,
    "first_notebook_cell": None,
    "copyfile_regex": "",
}

html_theme = "furo"
html_title = f"mpsearch {version}"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
