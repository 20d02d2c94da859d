"""Settings of the documentation site."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxlab

project = "jaxlab"
author = "The jaxlab authors"
release = jaxlab.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"jaxlab {release}"
exclude_patterns = ["_build"]
nb_execution_mode = "off"
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True
