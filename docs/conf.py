"""How the documentation is built: `make docs`."""

import inspect
import re
import typing

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


def readable(types: str) -> str:
    """Shorten annotations to what the source says."""
    for spelled_out in OPT_STATE:
        types = types.replace(spelled_out, "optax.OptState")
    types = re.sub(r"(\w+)\[Array, ('[^']*')\] \| ~?\1\[ndarray, \2\]", r"\1[Array | ndarray, \2]", types)
    types = types.replace("collections.abc.", "")
    return re.sub(r"(?<![~.\w])fashion_jax\.", "~fashion_jax.", types)


def shorten_signature(app, what, name, obj, options, arguments, returns):
    """Leave the types of documented attributes to their descriptions."""
    if arguments is None:
        return None
    if what == "class" and "Attributes:" in (obj.__doc__ or ""):
        # Flax gives its modules further parameters, which no user sets.
        own = [
            parameter for parameter in inspect.signature(obj).parameters.values() if parameter.name in documented(obj)
        ]
        arguments = str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in own]))
    return readable(arguments), readable(returns or "")


def move_types(app, what, name, obj, options, lines):
    """Put the type of an attribute beside its name; napoleon puts it below the description, as text."""
    moved = []
    for line in lines:
        if line.startswith(".. attribute::"):
            attribute = len(moved)
        if line.startswith("   :type:"):
            moved.insert(attribute + 1, readable(line))
        else:
            moved.append(line)
    lines[:] = moved


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the properties of a NamedTuple: the docstring of the class describes them."""
    return True if "Alias for field number" in (getattr(obj, "__doc__", None) or "") else None


def documented(cls) -> list[str]:
    """Name the attributes that a docstring describes."""
    return re.findall(r"^ {4}(\w+): ", inspect.cleandoc(cls.__doc__).partition("Attributes:")[2], re.MULTILINE)


def setup(app):
    """Let Sphinx call the functions above."""
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", move_types)
    app.connect("autodoc-skip-member", skip_fields)
