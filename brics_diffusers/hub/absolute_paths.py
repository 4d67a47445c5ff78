"""Absolute paths in settings, reports and command lines cut to their last part: where files lie is private."""

import re


# How a path begins that says where files lie; with a user's name too, as in ~me/.
ABSOLUTE = r"(?:file:/|~[\w.-]*)?/"
QUOTED = re.compile(rf"""(?<!\w)(['"])((?:--?[\w-]+=)?)({ABSOLUTE}.+?)\1""")
PLAIN = re.compile(rf"""(?<![\w./:~-]){ABSOLUTE}[^\s'",]+""")


def cut_absolute_paths(value):
    """
    Cuts absolute paths in what JSON can hold to their last part: `--config=/home/me/a.yaml` to `--config=a.yaml`.
    """
    if isinstance(value, dict):
        return {key: cut_absolute_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cut_absolute_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(ABSOLUTE, value):  # the whole string, which may hold spaces
        return _last_part(value)
    value = QUOTED.sub(lambda match: f"{match[1]}{match[2]}{_last_part(match[3])}{match[1]}", value)
    return PLAIN.sub(lambda match: _last_part(match[0]), value)


def _last_part(path: str) -> str:
    """`c` of `/a/b/c/` or `file:///a/b/c`; folders of the root, which everybody has, stay as they are."""
    parts = [part for part in path.removeprefix("file:").split("/") if part]
    return path if len(parts) < 2 else parts[-1]
