"""A built-in stand-in for PACS: 7 shape classes in 4 visual styles, rendered in seconds, deterministic by seed.

The styles keep the shape and change everything else, as PACS' domains do: `photo` is shaded and textured on a noisy
background, `cartoon` flat colours with a thick outline, `art_painting` brush strokes of a narrow palette, `sketch` thin
wavering lines on paper, unfilled. A net that leans on colour or texture fails on the style it has not seen.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from qat.domains.folders import ArrayImages, Domain
from qat.domains.splits import seed_hash

CLASSES = ("arrow", "circle", "cross", "heart", "square", "star", "triangle")
STYLES = ("art_painting", "cartoon", "photo", "sketch")
OVERSAMPLING = 2  # drawn larger, then reduced: smooth edges

Outline = NDArray[np.float64]  # (points, 2) within the unit circle
Colour = tuple[int, int, int]


def synthetic_domains(
    *, per_class: int, image_size: int, seed: int = 0
) -> list[Domain]:
    """The four styles as domains of `per_class` images of every class, `image_size` pixels square.

    Every image depends on (seed, style, class, number) alone. Raises ValueError for images too small to show a shape.
    """
    if image_size < 16:
        raise ValueError(
            f"--image-size {image_size}: synthetic shapes need at least 16 pixels"
        )
    return [_domain(style, per_class, image_size, seed) for style in STYLES]


def _domain(style: str, per_class: int, size: int, seed: int) -> Domain:
    pixels = [
        render(
            style,
            name,
            size,
            np.random.default_rng(seed_hash(seed, style, name, number)),
        )
        for name in CLASSES
        for number in range(per_class)
    ]
    labels = np.repeat(np.arange(len(CLASSES)), per_class).astype(np.int64)
    return Domain(style, CLASSES, ArrayImages(np.stack(pixels)), labels)


def render(
    style: str, shape: str, size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One image, uint8 size_size_3."""
    big = size * OVERSAMPLING
    points = _place(_outline(shape), big, rng)
    picture = PAINTERS[style](points, big, rng)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.uint8)


def _outline(shape: str) -> Outline:
    turn = 2 * math.pi
    match shape:
        case "circle":
            angles = np.linspace(0, turn, 40, endpoint=False)
            return np.stack([np.cos(angles), np.sin(angles)], 1) * 0.9
        case "square":
            return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.72
        case "triangle":
            angles = np.arange(3) * turn / 3 - turn / 4
            return np.stack([np.cos(angles), np.sin(angles)], 1)
        case "star":
            angles = np.arange(10) * turn / 10 - turn / 4
            radii = np.where(np.arange(10) % 2, 0.42, 1.0)
            return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)
        case "cross":
            a, b = 0.3, 0.95
            quarter = np.array([(-a, -b), (a, -b), (a, -a)])
            turns = [
                np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), n) for n in range(4)
            ]
            return np.concatenate([quarter @ turn for turn in turns])
        case "arrow":
            return np.array(
                [
                    (-0.95, -0.22),
                    (0.1, -0.22),
                    (0.1, -0.7),
                    (0.95, 0),
                    (0.1, 0.7),
                    (0.1, 0.22),
                    (-0.95, 0.22),
                ]
            )
        case "heart":
            t = np.linspace(0, turn, 48, endpoint=False)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return np.stack([16 * np.sin(t) ** 3, -y - 2], 1) / 17.5
    raise ValueError(f"unknown shape {shape!r}")


def _place(outline: Outline, size: int, rng: np.random.Generator) -> Outline:
    """Rotated by up to ±30°, scaled, squeezed a little and moved, in pixels."""
    angle = rng.uniform(-math.pi / 6, math.pi / 6)
    rotation = np.array(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    radius = size * rng.uniform(0.26, 0.40)
    squeeze = np.array([rng.uniform(0.85, 1.15), 1.0])
    centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - radius) * 0.7
    return (outline * squeeze) @ rotation.T * radius + centre


def _photo(points: Outline, size: int, rng: np.random.Generator) -> Image.Image:
    background = _blobs(size, rng, coarse=6) * 32 + rng.uniform(60, 170, 3)
    texture = _blobs(size, rng, coarse=24)[..., :1] * 25
    light = (
        np.linspace(-1, 1, size)[:, None, None]
        * rng.uniform(20, 55)
        * rng.choice([-1, 1])
    )
    body = _contrasting(background.mean((0, 1)), rng) + texture + light
    mask = (
        np.asarray(
            _mask(points, size).filter(ImageFilter.GaussianBlur(size / 90)), np.float64
        )[..., None]
        / 255
    )
    shadow_mask = _mask(points + size * 0.035, size).filter(
        ImageFilter.GaussianBlur(size / 25)
    )
    shadow = 1 - 0.45 * np.asarray(shadow_mask, np.float64)[..., None] / 255
    picture = (
        background * shadow * (1 - mask)
        + body * mask
        + rng.normal(0, 9, (size, size, 3))
    )
    return _image(picture)


def _cartoon(points: Outline, size: int, rng: np.random.Generator) -> Image.Image:
    backdrop = rng.uniform(130, 255, 3)
    picture = Image.new("RGB", (size, size), _colour(backdrop))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, 4)):  # flat clouds behind the shape
        (x, y), r = rng.uniform(0, size, 2), rng.uniform(0.08, 0.2) * size
        draw.ellipse(
            (x - r, y - r * 0.6, x + r, y + r * 0.6),
            fill=_colour(backdrop * rng.uniform(0.75, 0.95)),
        )
    saturated = np.array([230.0, rng.uniform(20, 200), 20.0])[rng.permutation(3)]
    draw.polygon(_list(points), fill=_colour(saturated))
    _stroke(draw, points, width=size // 24, colour=(15, 15, 15))
    return picture


def _art_painting(points: Outline, size: int, rng: np.random.Generator) -> Image.Image:
    ground = rng.uniform(95, 150, 3)
    figure = np.clip(
        ground + rng.choice([-1, 1]) * rng.uniform(75, 115) + rng.uniform(-30, 30, 3),
        0,
        255,
    )
    picture = Image.new("RGB", (size, size), _colour(ground))
    draw, inside = ImageDraw.Draw(picture), _mask(points, size)
    direction = rng.uniform(0, math.pi)
    reach = size / 14
    for x, y in rng.uniform(0, size, (700, 2)):
        base = figure if inside.getpixel((int(x), int(y))) else ground
        angle = direction + rng.normal(0, 0.35)
        dx, dy = math.cos(angle) * reach / 2, math.sin(angle) * reach / 2
        draw.line(
            (x - dx, y - dy, x + dx, y + dy),
            fill=_colour(base + rng.normal(0, 11, 3)),
            width=size // 26,
        )
    return picture.filter(ImageFilter.GaussianBlur(size / 140))


def _sketch(points: Outline, size: int, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (size, size), (252, 252, 250))
    draw = ImageDraw.Draw(picture)
    width = max(size // 60, 1)
    for _ in range(rng.integers(3, 8)):  # construction lines left on the page
        draw.line(
            rng.uniform(0, size, 4).tolist(),
            fill=(int(rng.integers(110, 190)),) * 3,
            width=width,
        )
    # Drawn over once or twice, never the same way, the pencil lifting now and then
    for _ in range(rng.integers(1, 3)):
        wavering = _subdivide(points) + rng.normal(
            0, size * 0.012, (len(points) * 4, 2)
        )
        shade = (int(rng.integers(0, 90)),) * 3
        for start, end in zip(wavering, np.roll(wavering, -1, axis=0), strict=True):
            if rng.random() > 0.12:
                draw.line((*start.tolist(), *end.tolist()), fill=shade, width=width)
    return picture


PAINTERS: dict[str, Callable[[Outline, int, np.random.Generator], Image.Image]] = {
    "art_painting": _art_painting,
    "cartoon": _cartoon,
    "photo": _photo,
    "sketch": _sketch,
}


def _blobs(size: int, rng: np.random.Generator, coarse: int) -> NDArray[np.float64]:
    """Smooth colour noise in [-1, 1], size_size_3."""
    small = Image.fromarray(rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
    return (
        np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float64)
        / 127.5
        - 1
    )


def _contrasting(
    background: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    away = np.where(background > 115, -1, 1)
    return np.asarray(background + away * rng.uniform(80, 130, 3))


def _mask(points: Outline, size: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).polygon(_list(points), fill=255)
    return mask


def _stroke(
    draw: ImageDraw.ImageDraw, points: Outline, width: int, colour: Colour
) -> None:
    draw.line(
        _list(np.concatenate([points, points[:2]])),
        fill=tuple(int(c) for c in colour),
        width=width,
        joint="curve",
    )


def _subdivide(points: Outline) -> Outline:
    following = np.roll(points, -1, axis=0)
    return np.concatenate(
        [points + (following - points) * part for part in (0, 0.25, 0.5, 0.75)], 1
    ).reshape(-1, 2)


def _list(points: Outline) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in points]


def _colour(values: NDArray[np.float64]) -> Colour:
    r, g, b = np.clip(values, 0, 255).astype(int)
    return int(r), int(g), int(b)


def _image(pixels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
