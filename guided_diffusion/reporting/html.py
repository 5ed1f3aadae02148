"""HTML as a tree, so that no text can become markup; images and drawings inside it."""

import base64
import io
from xml.etree import ElementTree

import numpy as np
from PIL import Image

Element = ElementTree.Element
Content = str | Element | None

ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def element(tag: str, *content: Content, **attributes: object) -> Element:
    """An element with text and elements in it, None left out.

    Attributes: `class_` is class, `data_row` is data-row; None and False are left out, True has no
    value.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            made.set(name.rstrip("_").replace("_", "-"), "" if value is True else str(value))
    for part in content:
        if isinstance(part, str):
            if len(made):
                made[-1].tail = (made[-1].tail or "") + part
            else:
                made.text = (made.text or "") + part
        elif part is not None:
            made.append(part)
    return made


def as_html(*elements: Element) -> str:
    """The text of elements, escaped where it has to be."""
    return "\n".join(
        ElementTree.tostring(one, encoding="unicode", method="html") for one in elements
    )


def image(pixels: np.ndarray, alt: str, width: int, **attributes: object) -> Element:
    """An image, uint8 [H, W, 3], as a PNG within the page, shown `width` CSS pixels wide."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    height = round(width * pixels.shape[0] / pixels.shape[1])
    size = {"width": width, "height": height, "class_": "crisp" if width > len(pixels[0]) else None}
    return element("img", src=source, alt=alt, **size, **attributes)
