"""Put a figure's SVG into an HTML page: no prolog, ids of its own, a description for those who cannot see it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_POINTS = 96 / 72 * 1.4  # CSS pixels per point, enlarged so that the figure's 8 points read as the page's small print


def inline(source: str, prefix: str, description: str) -> str:
    """The `<svg>` element of a document written by matplotlib, fit to stand in a page beside others.

    Args:
        source: the SVG document.
        prefix: put before every id and every reference to one, so that two figures never share one.
        description: read out in place of the picture.
    """
    root = ElementTree.fromstring(source)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key in (_HREF, "href"):
                element.set(key, re.sub(r"^#", f"#{prefix}-", value))
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    width = float(root.attrib.pop("width", "504pt").removesuffix("pt"))
    root.attrib.pop("height", None)
    root.set("style", f"width:100%;max-width:{width * _POINTS:.0f}px;height:auto")
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")
