"""Settings of Sphinx, for `make docs`."""

import inspect
import re
import typing
from pathlib import Path

# jaxtyping then names its types without their modules; it has to be set before anything is annotated.
typing.GENERATING_DOCUMENTATION = "fashion_jax"  # type: ignore[attr-defined]

import optax  # noqa: E402
from sphinx.util.typing import stringify_annotation  # noqa: E402

import fashion_jax  # noqa: E402

project = "fashion_jax"
release = fashion_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path, html_css_files = ["static"], ["style.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False
highlight_language = "none"

nitpicky = True
# What other packages offer cannot be looked up without network. In docstrings a name in backticks may be an argument.
nitpick_ignore_regex = [(r"py:.*", r"(?!fashion_jax\.).*")]
default_role = "py:obj"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_preserve_defaults = True
napoleon_attr_annotations = True
add_module_names = add_function_parentheses = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
python_trailing_comma_in_multi_line_signatures = False

OPT_STATE = [stringify_annotation(optax.OptState, mode) for mode in ("smart", "fully-qualified-except-typing")]


def read_readme(app, name, source):
    """Show the README as a page, with links as from here."""
    if name == "readme":
        readme = (Path(__file__).parents[1] / "README.md").read_text()
        source[0] = re.sub(r"\]\((?!https?:)(docs/)?", lambda found: "](" if found[1] else "](../", readme)
    source[0] = source[0].replace("](../README.md", "](readme.md")


def readable(types: str) -> str:
    """Shorten annotations to what the source says."""
    for spelled_out in OPT_STATE:
        types = types.replace(spelled_out, "optax.OptState")
    types = re.sub(r"TrainConfig\(model=.*?train_eval_size=\d+\)", "TrainConfig()", types, flags=re.DOTALL)
    types = re.sub(r"(\w+)\[Array, ('[^']*')\] \| ~?\1\[ndarray, \2\]", r"\1[Array | ndarray, \2]", types)
    types = types.replace("collections.abc.", "")
    return re.sub(r"(?<![~.\w])fashion_jax\.", "~fashion_jax.", types)


class Name:
    """Stands for a default: functions and modules have representations of several lines, or with an address."""

    def __init__(self, default):
        self.default = default

    def __repr__(self):
        """Return the default in words."""
        if inspect.isfunction(self.default):
            return self.default.__name__
        return f"{type(self.default).__name__}()" if callable(self.default) else repr(self.default)


def shorten_signature(app, what, name, obj, options, arguments, returns):
    """Leave the types of documented attributes to their descriptions."""
    if arguments is None:
        return None
    if what == "class" and "Attributes:" in (obj.__doc__ or ""):
        # Flax gives its modules further parameters, which no user sets.
        own = [p for p in inspect.signature(obj).parameters.values() if p.name in documented(obj)]
        defaults = [p.default if p.default is p.empty else Name(p.default) for p in own]
        plain = [p.replace(annotation=p.empty, default=default) for p, default in zip(own, defaults, strict=True)]
        arguments = str(inspect.Signature(plain))
    return readable(arguments), readable(returns or "")


def move_types(app, what, name, obj, options, lines):
    """Put the type of an attribute beside its name; napoleon puts it below the description, as text."""
    moved = []
    for line in lines:
        # [*axes, epochs] is a shape, not the beginning of an emphasis.
        line = line.replace("[*", "[\\*")
        if line.startswith(".. attribute::"):
            attribute = len(moved)
        if line.startswith("   :type:"):
            moved.insert(attribute + 1, readable(line))
        else:
            moved.append(line)
    lines[:] = moved


def skip_fields(app, what, name, obj, skip, options):
    """Leave out fields, which the docstring of the class describes: of named tuples, and those that are functions."""
    named = "Alias for field number" in (getattr(obj, "__doc__", None) or "")
    return True if named or (what == "class" and inspect.isfunction(obj) and obj.__name__ != name) else None


def documented(cls) -> list[str]:
    """Name the attributes that a docstring describes."""
    return re.findall(r"^ {4}(\w+): ", inspect.cleandoc(cls.__doc__).partition("Attributes:")[2], re.MULTILINE)


def setup(app):
    """Let Sphinx call the functions above."""
    app.connect("source-read", read_readme)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", move_types)
    app.connect("autodoc-skip-member", skip_fields)
