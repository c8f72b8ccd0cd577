"""Sphinx configuration: ``make docs``."""

project = "vmsnap"
author = "the vmsnap developers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "vmsnap"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"
exclude_patterns = ["_build"]
nitpicky = False
