"""The opening figure as other eyes see it, and as it prints without colour.

`make notebooks` runs this after the notebook that draws figures/lora_in_one_picture.png.
"""

from pathlib import Path

import matplotlib.image
import numpy as np
from colorspacious import cspace_convert

from lora_course import figures

FIGURES = Path(__file__).parent.parent / "figures"
SEEN, WRITTEN = FIGURES / "lora_in_one_picture.png", FIGURES / "other_eyes.png"
WAYS = {
    "deuteranomaly": "Without green cones (deuteranopia)",
    "grey": "In grey, as printed without colour",
}


def seen_by(eyes: str, rgb: np.ndarray) -> np.ndarray:
    """sRGB (…, 3) in [0, 1] as seen with `eyes`: "usual", "grey" (lightness alone), or without one
    kind of cone: "protanomaly", "deuteranomaly" or "tritanomaly" at full strength (Machado et al.
    2009)."""
    if eyes == "usual":
        return np.asarray(rgb)
    if eyes == "grey":
        lab = cspace_convert(rgb, "sRGB1", "CIELab")
        lab[..., 1:] = 0
        return np.clip(cspace_convert(lab, "CIELab", "sRGB1"), 0, 1)
    space = {"name": "sRGB1+CVD", "cvd_type": eyes, "severity": 100}
    return np.clip(cspace_convert(rgb, space, "sRGB1"), 0, 1)


def draw(picture: np.ndarray):
    """A figure with `picture`, sRGB (height, width, 3), once for each of WAYS."""
    fig, axes = figures.figure(rows=len(WAYS), height=len(WAYS) * figures.TALL)
    for ax, (eyes, title) in zip(axes, WAYS.items(), strict=True):
        ax.imshow(seen_by(eyes, picture))
        ax.set_title(title)
        ax.axis("off")
    return fig


if __name__ == "__main__":
    figure = draw(matplotlib.image.imread(SEEN)[..., :3])
    figure.savefig(WRITTEN, dpi=100, metadata={"Software": None})
