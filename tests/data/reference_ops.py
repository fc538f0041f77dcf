"""Images with special cases, and torchvision's functional for each operation."""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from vitral.data.augment import magnitudes
from vitral.data.ops import Op


def pictures(size, seed=0):
    """Realistic uint8 images: smooth colors with noise, some dark, gray, constant or binary."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(12, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    noise = 0.04 * torch.randn(smooth.shape, generator=generator)
    images = ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)
    images[6] //= 4
    images[7] = images[7, :1]
    images[8] = torch.tensor([3, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    images[9] = 0
    images[10] = (images[10] > 127).to(torch.uint8) * 255
    images[11] = images[11] // 32 * 32 + 9
    return images


def apply_reference(image, op, value):
    """Applies torchvision's functional for one operation to one image."""
    level = value - 1
    shear = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "center": [0, 0]}
    degrees = float(np.degrees(np.arctan(value)))
    shift = {"angle": 0.0, "scale": 1.0, "shear": [0.0, 0.0]}
    functionals = {
        Op.IDENTITY: lambda: image,
        Op.SHEAR_X: lambda: TF.affine(image, shear=[degrees, 0.0], **shear),
        Op.SHEAR_Y: lambda: TF.affine(image, shear=[0.0, degrees], **shear),
        Op.TRANSLATE_X: lambda: TF.affine(image, translate=[int(value), 0], **shift),
        Op.TRANSLATE_Y: lambda: TF.affine(image, translate=[0, int(value)], **shift),
        Op.ROTATE: lambda: TF.rotate(image, value),
        Op.BRIGHTNESS: lambda: TF.adjust_brightness(image, 1.0 + level),
        Op.SATURATION: lambda: TF.adjust_saturation(image, 1.0 + level),
        Op.CONTRAST: lambda: TF.adjust_contrast(image, 1.0 + level),
        Op.SHARPNESS: lambda: TF.adjust_sharpness(image, 1.0 + level),
        Op.POSTERIZE: lambda: TF.posterize(image, int(value)),
        Op.SOLARIZE: lambda: TF.solarize(image, value),
        Op.AUTOCONTRAST: lambda: TF.autocontrast(image),
        Op.EQUALIZE: lambda: TF.equalize(image),
        Op.INVERT: lambda: TF.invert(image),
        Op.HUE: lambda: TF.adjust_hue(image, value),
        Op.GRAYSCALE: lambda: TF.rgb_to_grayscale(image, 3),
        Op.BLUR: lambda: TF.gaussian_blur(image, 13, value),
    }
    return functionals[op]()


def values_of(op, size):
    """Returns values that are drawn for `op`, including both ends of its range."""
    if op <= Op.INVERT:
        table = np.concatenate([magnitudes(n, size)[op] for n in (10, 31)])
        table = np.append(table, magnitudes(31, size, wide=True)[op])
        if op <= Op.SHARPNESS:
            table = np.concatenate([table, -table])
        if op in (Op.TRANSLATE_X, Op.TRANSLATE_Y):
            table = np.trunc(table)
        return np.unique(table + (Op.BRIGHTNESS <= op <= Op.SHARPNESS))
    return {
        Op.HUE: np.linspace(-0.5, 0.5, 41),
        Op.GRAYSCALE: np.zeros(1),
        Op.BLUR: np.linspace(0.1, 2.0, 9) if size > 6 else np.zeros(0),
    }[op]
