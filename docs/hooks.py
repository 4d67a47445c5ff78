"""Brings the marks of diffusers' docstrings into the reference's own: [`BricsAutoencoder`], `int`, defaults to 3."""

import re


CODE = re.compile(r"\[?<code>(?P<text>[^<]*)</code>\]?")
MARKS = re.compile(r"\[`|`\]|`|^~")
DEFAULT = re.compile(r", defaults to .*$")  # mkdocstrings shows it besides


def _plain(match: re.Match) -> str:
    text, whole = match["text"], match[0]
    if not (text.startswith(("`", "[`", "~")) or (whole.startswith("[") and whole.endswith("]"))):
        return whole
    text = MARKS.sub("", DEFAULT.sub("", text)).replace("*optional*", "optional")
    return f"<code>{text}</code>"


def on_page_content(html: str, page, **kwargs) -> str:
    """MkDocs calls this with each page's HTML."""
    return CODE.sub(_plain, html) if page.file.src_uri == "api.md" else html
