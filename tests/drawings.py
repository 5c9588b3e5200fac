"""Pictures drawn by formula that real models understand: lines of text, and faces."""

from __future__ import annotations

import numpy as np

GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111", "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110", "9": "01110 10001 10001 01111 00001 00010 01100",
    "E": "11111 10000 10000 11110 10000 10000 11111", "H": "10001 10001 10001 11111 10001 10001 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111", "T": "11111 00100 00100 00100 00100 00100 00100",
}  # fmt: skip
"""Letters of 7 rows of 5 dots."""


def line(text: str, width: int = 320) -> np.ndarray:
    """Dark letters on a light line, as PP-OCR's recogniser takes it: [3, 48, width] from −1 to 1."""
    dots = np.zeros((7, 6 * len(text)))
    for place, letter in enumerate(text):
        if letter != " ":
            rows = [[float(dot) for dot in row] for row in GLYPHS[letter].split()]
            dots[:, 6 * place : 6 * place + 5] = rows
    ink = np.kron(dots, np.ones((4, 4)))
    for _ in range(2):
        for axis in (0, 1):
            ink = np.apply_along_axis(lambda row: np.convolve(row, [0.25, 0.5, 0.25], "same"), axis, ink)
    page = np.zeros((48, width))
    page[10:38, 8 : 8 + ink.shape[1]] = ink[:, : width - 8]
    return np.repeat((1 - 2 * page)[None], 3, axis=0).astype(np.float32)


def face(seed: int, size: int = 320) -> np.ndarray:
    """A face of ellipses before a grey wall, [3, size, size] from 0 to 1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size].astype(float)
    left, top = rng.uniform(0.44, 0.56, 2) * size
    wide, high = rng.uniform(0.14, 0.25) * size, rng.uniform(0.19, 0.33) * size
    picture = np.ones((3, size, size)) * np.array([0.45, 0.5, 0.55])[:, None, None]

    def paint(right: float, down: float, width: float, height: float, colour: tuple[float, ...]) -> None:
        """An ellipse around a place in units of the face, with a soft edge."""
        distance = np.hypot((x - left - right * wide) / (width * wide), (y - top - down * high) / (height * high))
        cover = 1 / (1 + np.exp((distance - 1) * min(width * wide, height * high) / 1.5))
        picture[:] = picture * (1 - cover) + cover * np.array(colour)[:, None, None]

    hair, skin, dark = (0.15, 0.1, 0.08), (0.87, 0.68, 0.56), (0.1, 0.07, 0.05)
    paint(0, -0.25, 1.25, 1.15, hair)
    paint(0, 1.6, 1.9, 0.8, (0.2, 0.25, 0.5))
    paint(0, 1, 0.45, 0.5, (0.78, 0.61, 0.5))
    paint(0, 0, 1, 1, skin)
    for side in (-0.4, 0.4):
        paint(side, -0.15, 0.19, 0.085, (0.95, 0.95, 0.95))
        paint(side, -0.15, 0.085, 0.085, dark)
        paint(side, -0.33, 0.25, 0.04, hair)
    paint(0, 0.2, 0.13, 0.07, (0.65, 0.51, 0.42))
    paint(0, 0.5, 0.33, 0.075, (0.65, 0.25, 0.25))
    return picture.clip(0, 1).astype(np.float32)
