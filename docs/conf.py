"""The site: `make docs` builds it from the pages here into build/site. It needs no network, to build or to read."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import draw_architecture  # noqa: E402

from odcft import __version__ as release  # noqa: E402

project, author = "odcft", "the authors of odcft"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", f"odcft {release}"
html_show_copyright = html_show_sphinx = False
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["myst.header"]  # pages that are included begin where they like
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
add_module_names = False


class Mermaid(Directive):
    """GitHub draws such blocks with a script from the network; here the drawing is made when the site is built."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The drawing of docs/architecture.md, the only one there is."""
        return [nodes.raw("", draw_architecture.svg(), format="html")]


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.add_directive("mermaid", Mermaid)  # type: ignore[attr-defined]
