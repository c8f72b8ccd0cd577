"""Sphinx configuration: ``make docs`` and ``make man``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from docs import generate

generate.write(Path(__file__).parent / "generated")

project = "vmsnap"
author = "the vmsnap developers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "vmsnap"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"
exclude_patterns = ["_build", "examples"]
nitpicky = False
man_pages = [("generated/commands", "vmsnap", "live backup of whole running virtual machines", author, 1)]
