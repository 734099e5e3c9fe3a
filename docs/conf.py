"""Sphinx settings. `make docs` builds the site from the Markdown that GitHub shows; a warning is an error.

A page fetches nothing when it is viewed: it uses the system's fonts, and the build turns formulas into MathML.
"""

import itertools
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flowseg_kernels import __version__  # noqa: E402

project, author, release = "FlowSeg", "The FlowSeg authors", __version__
copyright = "The FlowSeg authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]

root_doc = "README"
html_theme = "furo"
html_title = f"FlowSeg {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["static"]
smartquotes_action = "De"  # dashes, not curly quotes: a quoted value is code
html_show_sphinx = False
html_copy_source = False
keep_warnings = True

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# A colon in "Returns" is punctuation, not the end of a type.
napoleon_custom_sections = [("Returns", "as text")]
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

#: The side bar: titles and the pages below them. It is here because README.md must have no directives: GitHub shows it too.
NAVIGATION = {
    "Start": ["installing", "method", "codes", "glossary"],
    "Guides": [
        "guides/drop_in",
        "guides/composing",
        "guides/pixnerd",
        "guides/training",
        "guides/how_long",
        "guides/clusters",
        "guides/gpu",
        "guides/adding_an_op",
    ],
    "Ops": [
        "ops/flow_interpolate",
        "ops/distance_correction",
        "ops/flow_loss",
        "ops/nearest_centroid",
        "ops/decode_confusion",
        "ops/top_classes",
        "ops/class_probabilities",
        "ops/neural_field",
    ],
    "Reference": ["api/flowseg_kernels", "api/flowseg", "api/command_line", "environment", "troubleshooting"],
    "Results": [
        "results/bench",
        "results/camvid",
        "results/paints",
        "results/fuzz",
        "results/mutation",
        "results/sanitizers",
        "results/coverage",
        "results/versions",
        "results/routes",
        "notes/performance",
        "notes/static_counts",
        "notes/h100",
    ],
}


def _add_navigation(app, docname, source):
    if docname == root_doc:
        for title, pages in NAVIGATION.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])


def _name_files_outside(app, docname, source):
    """Replace links to files above docs/ by their names. On GitHub they are links, but the site does not have these files."""
    outside = r"(?:\.\./)+((?:CONTRIBUTING|CHANGELOG)\.md|configs/[\w./]+)|\.\./\.\./(README\.md)"
    source[0] = re.sub(rf"\[[^\]]+\]\((?:{outside})[^)]*\)", lambda link: f"`{link[1] or link[2]}`", source[0])


def _add_options(app, docname, source):
    if docname != "api/command_line":
        return
    import typer

    from flowseg.cli import app as command_line

    def marked(text):
        return re.sub(r"(--[\w-]+)", r"`\1`", text or "")

    for name, command in typer.main.get_command(command_line).commands.items():
        source[0] += f"\n## flowseg {name}\n\n{marked(command.help)}\n\n| option | default | meaning |\n|---|---|---|\n"
        for option in command.params:
            value = getattr(option.default, "value", option.default)
            default = "required" if option.required else "" if value in (None, False, []) else f"`{value}`"
            shown = " ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
            source[0] += f"| `{shown}` | {default} | {marked(option.help)} |\n"


def _plain(app, what, name, obj, options, lines):
    """Escape the bars of norms such as |x| in docstrings; reStructuredText would read them as a substitution."""
    lines[:] = [re.sub(r"(?<![`\\])\|", r"\\|", line) if "``" not in line else line for line in lines]


def _mathml(self, node):
    """Write a formula as MathML, which browsers draw without a script."""
    block = node.tagname == "math_block"
    formula = convert(node.astext(), display="block" if block else "inline")
    # Mark bars in turn as opening and closing; an unmarked bar would be spaced like a relation.
    forms = itertools.cycle(("prefix", "postfix"))
    formula = re.sub(
        r"<mo[^>]*>(?=(?:&#x0007C;|\|)</mo>)", lambda _: f'<mo stretchy="false" form="{next(forms)}">', formula
    )
    self.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def _fetches_nothing(app, error):
    """Raise an error if a page fetches a style, script, font or picture from elsewhere: it must work without a network."""
    if error or app.builder.name != "html":
        return
    for page in (*Path(app.outdir).rglob("*.html"), *Path(app.outdir).rglob("*.css")):
        text = page.read_text()
        found = re.search(
            r"""(?:<(?:script|img|iframe)[^>]*src=|<link[^>]*href=|url\(|@import )["']?(?:https?:)?//[^"')]+""", text
        )
        if found:
            raise RuntimeError(f"{page} fetches {found[0]}")


def setup(app):
    app.connect("source-read", _add_navigation)
    app.connect("source-read", _name_files_outside)
    app.connect("source-read", _add_options)
    app.connect("autodoc-process-docstring", _plain, priority=400)
    app.connect("build-finished", _fetches_nothing)
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    return {"parallel_read_safe": True}
