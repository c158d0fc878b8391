"""HTML and SVG as nested calls that escape every text and attribute: nothing that a result says becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

Attribute = str | int | float | bool | None

VOID = frozenset({"br", "img", "input", "meta", "line", "rect", "circle", "path"})
"""Elements without content; the last four are SVG's, which are closed by a slash."""


class Markup(str):
    """Text that is markup already, and is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *content: Markup | str | Iterable[Markup | str] | None, **attributes: Attribute) -> Markup:
    """An element. Plain strings are escaped; ``None`` is left out, among the attributes too.

    Attributes are written without their trailing underscore and with hyphens: ``class_="a"``, ``stroke_width=2``,
    ``aria_label="x"``; ``viewBox`` keeps its capital. ``True`` is an attribute without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID and not content:
        return Markup(f"<{name}{written}/>" if name in ("line", "rect", "circle", "path") else f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*content)}</{name}>")


def join(*content: Markup | str | Iterable[Markup | str] | None) -> Markup:
    """Pieces one after the other, each escaped unless it is markup."""
    parts: list[str] = []
    for piece in content:
        if piece is None:
            continue
        if isinstance(piece, Markup):
            parts.append(piece)
        elif isinstance(piece, str):
            parts.append(html.escape(piece))
        else:
            parts += [each if isinstance(each, Markup) else html.escape(each) for each in piece]
    return Markup("".join(parts))


def svg(title: str, /, *content: Markup | str | Iterable[Markup | str] | None, **attributes: Attribute) -> Markup:
    """A picture with its description for those who cannot see it."""
    return tag("svg", *content, role="img", aria_label=title, **attributes)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    key = name.removesuffix("_").replace("_", "-")
    if value is True:
        return f" {key}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {key}="{html.escape(text)}"'
