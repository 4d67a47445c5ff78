"""Small image files for the tests of the data package."""

import io

from PIL import Image


COLORS = [(250, 10, 20), (30, 240, 50), (60, 70, 230), (80, 90, 100), (200, 210, 20), (5, 5, 5)]


def save(path, color=(10, 20, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
