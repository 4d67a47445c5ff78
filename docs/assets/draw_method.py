"""Draws the figure of the method, `method.svg` beside this file: `python docs/assets/draw_method.py`."""

import random
from pathlib import Path


WIDTH, HEIGHT = 1040, 452
INK, FAINT, PANEL = "#24313f", "#5f6d7c", "#fbfcfd"
GROUPS = ("#2f6fb5", "#d9822b", "#3c9a63", "#8e5bb0")  # one colour a group
GREYS = ("#5d6b7a", "#71808f", "#8795a3", "#9dabb7")  # noise
ROW = 190  # middle of stage one
LANES = (94, 158, 222, 286)  # middle of each group's grids
SECOND = 398  # middle of stage two


def tint(color, share):
    """A colour mixed with white, of which the rest is."""
    parts = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in parts)


def line(x1, y1, x2, y2, color=INK, width=1.6, more=""):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="{width}" {more}/>'


def arrow(*points, color=INK, dashes=""):
    path = " L".join(f"{x} {y}" for x, y in points)
    more = f'stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.6" marker-end="url(#tip)" {more}/>'


def curve(path, color):
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def polygon(points, fill, stroke=INK, width=1.2):
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polygon points="{corners}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" stroke-linejoin="round"/>'
    )


def text(x, y, words, size=14, color=INK, anchor="middle", weight="normal", style="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-style="{style}">{words}</text>'
    )


def picture(x, y, size=84):
    """A landscape: stands for an image and for its reconstruction."""
    shapes = (
        '<rect width="84" height="84" fill="#bfe0f2"/><circle cx="61" cy="22" r="11" fill="#f6c445"/>'
        '<path d="M0 62 L26 26 L46 54 L58 40 L84 68 V84 H0 Z" fill="#6d8fa8"/>'
        '<path d="M18 37 L26 26 L34 37 L29 40 L25 36 L21 41 Z" fill="#ffffff"/>'
        '<path d="M0 66 Q24 54 46 66 T84 64 V84 H0 Z" fill="#69a85c"/>'
    )
    frame = f'<rect width="84" height="84" fill="none" stroke="{INK}" stroke-width="1.2"/>'
    return f'<g transform="translate({x} {y}) scale({size / 84})">{shapes}{frame}</g>'


def planes(x, y, colors, seed):
    """A stack of square planes, the first in front: channels of a key code at a 5 x 5 grid."""
    draw, parts, side, step = random.Random(seed), [], 60, 11
    for index in reversed(range(len(colors))):
        left, top = x + index * step, y - index * step
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="#ffffff"/>')
        for cell in range(25):
            column, row = cell % 5, cell // 5
            parts.append(
                f'<rect x="{left + column * 12}" y="{top + row * 12}" width="12" height="12" fill="{colors[index]}" '
                f'fill-opacity="{draw.choice((0.12, 0.3, 0.5, 0.7, 0.9))}"/>'
            )
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="{INK}"/>')
    return "".join(parts)


def cube(x, y, cells, color, side=34, depth=11):
    """A cube of cells ** 3, its front's lower left corner at (x, y), with a point in it."""
    top, parts = y - side, []
    parts.append(polygon([(x, y), (x + side, y), (x + side, top), (x, top)], "#ffffff", color))
    roof = [(x, top), (x + side, top), (x + side + depth, top - depth), (x + depth, top - depth)]
    wall = [(x + side, y), (x + side + depth, y - depth), (x + side + depth, top - depth), (x + side, top)]
    parts += [polygon(roof, tint(color, 0.15), color), polygon(wall, tint(color, 0.3), color)]
    for number in range(1, cells):
        near, far = side * number / cells, depth * number / cells
        parts += [
            line(x + near, y, x + near, top, color, 0.8),
            line(x, y - near, x + side, y - near, color, 0.8),
            line(x + near, top, x + near + depth, top - depth, color, 0.8),
            line(x + far, top - far, x + side + far, top - far, color, 0.8),
            line(x + side + far, y - far, x + side + far, top - far, color, 0.8),
            line(x + side, y - near, x + side + depth, y - near - depth, color, 0.8),
        ]
    parts.append(f'<circle cx="{x + side * 0.64:.1f}" cy="{y - side * 0.42:.1f}" r="3.4" fill="{INK}"/>')
    return "".join(parts)


def box(x, y, width, height, words, fill, size=13):
    return (
        f'<rect x="{x}" y="{y - height / 2}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{INK}" '
        f'stroke-width="1.2"/>' + text(x + width / 2, y + 4.5, words, size)
    )


def block(x, y, side=64, thickness=10, lean=22):
    """The feature block: one slab a group, the first in front."""
    parts = []
    for index in reversed(range(len(GROUPS))):
        left, top, color = x + index * (thickness + 1), y - side / 2 - index * 6 + 9, GROUPS[index]
        front = [(left, top), (left + lean, top - 14), (left + lean, top + side - 14), (left, top + side)]
        parts.append(polygon(front, tint(color, 0.6), INK))
    return "".join(parts)


def draw():
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="BRICS: an encoder makes a key code; each '
        "group of its channels looks features up in grids of its own; a style decoder makes the image. A diffusion "
        'model generates key codes.">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="{PANEL}" stroke="#cfd6dd"/>',
        text(24, 34, "Stage one: the autoencoder", 16, anchor="start", weight="bold"),
        line(24, 334, WIDTH - 24, 334, "#cfd6dd", 1.2, 'stroke-dasharray="5 5"'),
    ]
    # image -> encoder -> key code
    parts += [picture(24, ROW - 42), text(66, ROW + 62, "image")]
    parts += [arrow((112, ROW), (130, ROW))]
    parts += [polygon([(134, ROW - 46), (208, ROW - 24), (208, ROW + 24), (134, ROW + 46)], "#e6ebf0")]
    parts += [text(170, ROW + 5, "encoder", 13), arrow((212, ROW), (232, ROW))]
    parts += [planes(238, ROW - 14, GROUPS, 4)]
    parts += [text(286, ROW + 72, "key code", weight="bold"), text(286, ROW + 90, "numbers in [0, 1]", 12, FAINT)]
    # one lane a group: point -> grids of rising resolution -> MLP -> its slab of the feature block
    parts += [text(534, 50, "grids of each group, coarse to fine", 13)]
    for index, (color, y) in enumerate(zip(GROUPS, LANES, strict=True), start=1):
        parts.append(curve(f"M338 {ROW - 12} C366 {ROW - 12} 352 {y} 374 {y}", color))
        parts += [text(378, y + 5, "(x, y, z", 13, anchor="start", style="italic"), text(427, y + 8, index, 9)]
        parts += [text(433, y + 5, ")", 13, style="italic"), arrow((440, y), (452, y))]
        parts += [cube(458 + 54 * level, y + 22, cells, color) for level, cells in enumerate((1, 2, 4))]
        parts += [arrow((614, y), (628, y)), box(632, y, 54, 30, "MLP", tint(color, 0.25))]
        end = ROW - 20 + 14 * (index - 1)
        parts.append(curve(f"M686 {y} C716 {y} 704 {end} 732 {end}", color))
    parts += [text(534, 324, "interpolated at the point, one feature vector a level", 12, FAINT)]
    parts += [block(738, ROW), text(768, ROW + 72, "feature block", 13)]
    # decoder
    parts += [arrow((800, ROW), (826, ROW))]
    parts += [polygon([(830, ROW - 24), (904, ROW - 46), (904, ROW + 46), (830, ROW + 24)], "#e6ebf0")]
    parts += [text(869, ROW - 3, "style", 13), text(869, ROW + 13, "decoder", 13)]
    parts += [
        arrow((657, 78), (657, 66), (867, 66), (867, ROW - 42), dashes="4 3"),
        text(762, 58, "style code", 12, FAINT),
    ]
    parts += [arrow((908, ROW), (926, ROW)), picture(932, ROW - 42), text(974, ROW + 62, "reconstruction")]
    # stage two
    parts += [text(24, 362, "Stage two: diffusion", 16, anchor="start", weight="bold")]
    parts += [
        planes(500, SECOND - 16, GREYS, 9),
        text(616, SECOND - 6, "noise of a key code's shape,", 13, anchor="start"),
        text(616, SECOND + 12, "denoised step by step", 13, anchor="start"),
    ]
    parts += [arrow((492, SECOND), (444, SECOND))]
    unet = [(440, -28), (412, -14), (384, -28), (384, 28), (412, 14), (440, 28)]
    parts += [polygon([(x, SECOND + y) for x, y in unet], "#e6ebf0"), text(412, SECOND + 5, "UNet", 13)]
    parts += [arrow((380, SECOND), (286, SECOND), (286, 290))]
    parts += [text(274, SECOND + 4, "a new key code, decoded as above", 13, anchor="end")]
    return "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    (Path(__file__).parent / "method.svg").write_text(draw())
