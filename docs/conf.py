r"""Settings of the pages; build them with ``make docs``."""

from importlib.metadata import version as installed_version

project = "partpar"
author = "The partpar authors"
version = release = installed_version("partpar")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "The same numbers as one process, on any number of workers"}

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_custom_sections = [("Shapes", "params_style")]  # PyG's dialect
