"""The course as a site with a search: the notebooks and pages as they are, nothing executed.

    pip install myst-nb furo
    sphinx-build -c docs . out/site

Then open out/site/docs/index.html in a browser, or put out/site on any web server.
"""

project = "Music with state spaces"
root_doc = "docs/index"
extensions = ["myst_nb"]
html_theme = "furo"
nb_execution_mode = "off"  # they are committed executed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "notebooks/*.md",
    "README.md",
    "GLOSSARY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "AGENTS.md",
    "data/model/README.md",
    "slides/README.md",
    "slides/teaching.md",
]
# links that lead to code and folders are those of the repository, and no pages of the site
suppress_warnings = ["myst.xref_missing", "myst.header", "toc.not_included"]
