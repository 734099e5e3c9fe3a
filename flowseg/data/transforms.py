"""Turn images and label maps at native size into tensors for training and inference."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

from flowseg.config import DataConfig
from flowseg.label_kinds import BYTES, WORDS, LabelKind, kind_of

# Number of crops to try if one class covers too much of each.
CROP_TRIES = 10
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to ``(3, H, W)`` float32 in [-1, 1]."""
    return normalised(torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1))


def labels_tensor(labels: Image.Image) -> Tensor:
    """Convert a label map to a tensor ``(H, W)``: int32 from mode ``I`` or ``I;16``, uint8 from the modes of 8 bits."""
    return torch.from_numpy(np.array(labels, _kind_of_picture(labels).array))


def _kind_of_picture(labels: Image.Image) -> LabelKind:
    return WORDS if labels.mode.startswith(WORDS.mode) else BYTES


def normalised(images: Tensor) -> Tensor:
    """Convert values 0 to 255 of any shape, uint8, to float32 in [-1, 1]; on every device by the same arithmetic."""
    # A GPU multiplies by the rounded reciprocal of a number, but divides exactly by a tensor in its memory.
    return images.float().div_(images.new_full((), 127.5, dtype=torch.float32)).sub_(1.0)


def augment(
    image: Image.Image, labels: Image.Image, config: DataConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Scale, crop, flip and recolour a pair at random; the result has the training size.

    At scale 1 the pair just covers ``config.height x config.width``. At smaller scales it is placed on a mid-grey canvas
    with ignored labels. If one class covers more than ``config.max_class_share`` of a crop, another crop is drawn, ten
    times at most. Labels are resampled by nearest neighbour.

    Returns:
        image ``(3, h, w)`` uint8 and labels ``(h, w)`` of :func:`labels_tensor`.
    """
    if labels.mode.startswith("I;16"):
        labels = labels.convert(WORDS.mode)
    width, height = image.size
    out_w, out_h = config.width, config.height
    # Log-uniform: halving and doubling are equally likely.
    scale = float(np.exp(rng.uniform(np.log(config.scale_min), np.log(config.scale_max))))
    scale *= max(out_w / width, out_h / height)
    offsets = rng.uniform(size=2)
    flip, brightness, contrast = rng.uniform() < 0.5, *(1 + config.color_jitter * rng.uniform(-1, 1, 2))

    for _ in range(CROP_TRIES):
        x0, x1, left, paste_w = _window(width, out_w, scale, offsets[0])
        y0, y1, top, paste_h = _window(height, out_h, scale, offsets[1])
        box = (x0, y0, x1, y1)
        cropped = labels.resize((paste_w, paste_h), NEAREST, box=box)
        if config.max_class_share == 1 or _largest_share(cropped) <= config.max_class_share:
            break
        offsets = rng.uniform(size=2)
    labels = cropped
    image = image.resize((paste_w, paste_h), BILINEAR, box=box)
    if config.photometric:
        image = distort(image, rng)
    if config.color_jitter:
        image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
    if (paste_w, paste_h) != (out_w, out_h):
        canvas = Image.new("RGB", (out_w, out_h), (128, 128, 128))
        canvas.paste(image, (left, top))
        kind = _kind_of_picture(labels)
        canvas_labels = Image.new(kind.mode, (out_w, out_h), kind.ignore)
        canvas_labels.paste(labels, (left, top))
        image, labels = canvas, canvas_labels
    pixels, target = torch.from_numpy(np.array(image, np.uint8)), labels_tensor(labels)
    pixels = pixels.permute(2, 0, 1)
    if config.flip and flip:
        pixels, target = pixels.flip(-1), target.flip(-1)
    return pixels, target


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Photometric distortion as in SSD (arXiv 1512.02325).

    Brightness changes by up to 32 of 255, contrast and saturation by factors of 0.5 to 1.5, hue by up to 18 degrees, each
    with probability one half. Contrast changes before or after saturation and hue.
    """
    apply = rng.uniform(size=5) < 0.5
    shift, contrast, saturation, hue = rng.uniform((-32, 0.5, 0.5, -18), (32, 1.5, 1.5, 18))
    pixels = np.asarray(image, np.float32)
    if apply[0]:
        pixels = pixels + np.float32(shift)
    if apply[1] and apply[4]:
        pixels = pixels * np.float32(contrast)
    if apply[2] or apply[3]:
        h, s, v = np.moveaxis(np.array(_picture(pixels).convert("HSV")), -1, 0)
        if apply[2]:
            s = np.clip(s * np.float32(saturation), 0, 255).astype(np.uint8)
        if apply[3]:
            # In Pillow the full circle of hues is 256, so bytes wrap around correctly.
            h = h + np.uint8(round(hue * 256 / 360) % 256)
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in (h, s, v)]
        pixels = np.asarray(Image.merge("HSV", bands).convert("RGB"), np.float32)
    if apply[1] and not apply[4]:
        pixels = pixels * np.float32(contrast)
    return _picture(pixels)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def _largest_share(labels: Image.Image) -> float:
    values = np.asarray(labels)
    ignore = kind_of(values).ignore
    counts = np.bincount(values.ravel(), minlength=ignore + 1)[:ignore]
    return counts.max() / max(counts.sum(), 1)


def _window(native: int, wanted: int, scale: float, offset: float) -> tuple[float, float, int, int]:
    """Crop along one axis: start and end of the native interval, where to paste it, and its scaled length."""
    length = wanted / scale
    if length <= native + 1e-6:
        start = offset * max(native - length, 0.0)
        return start, min(start + length, native), 0, wanted
    paste = min(wanted, max(1, round(native * scale)))
    return 0.0, float(native), int(offset * (wanted - paste + 1)), paste


def model_size(native: tuple[int, int], config: DataConfig, resize: str = "fit", scale: float = 1.0) -> tuple[int, int]:
    """Size ``(h, w)`` at which the network sees an image of size ``native`` ``(H, W)``; proportions are kept.

    Args:
        native: size of the image.
        config: training size.
        resize: ``"fit"``: the largest size inside the training size; ``"cover"``: the smallest size that covers it, as in
            training; ``"native"``: the image's own size.
        scale: factor on that size.
    """
    ratios = config.height / native[0], config.width / native[1]
    scale *= {"fit": min(ratios), "cover": max(ratios), "native": 1.0}[resize]
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def prepare(image: Image.Image, size: tuple[int, int], patch_size: int) -> Tensor:
    """Resize an image to ``size`` ``(h, w)`` for inference, and repeat its edge up to whole patches.

    Returns:
        ``(3, h', w')`` float32 in [-1, 1].
    """
    return pad_to_patches(to_tensor(resized(image, size)), patch_size)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image to ``size`` ``(h, w)``; an image of that size is returned as it is."""
    return image if image.size == size[::-1] else image.resize(size[::-1], BILINEAR)


def pad_to_patches(image: Tensor, patch_size: int) -> Tensor:
    """:func:`pad_to` the next multiples of the patch size."""
    height, width = image.shape[-2:]
    return pad_to(image, height + -height % patch_size, width + -width % patch_size)


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """Pad ``(3, H, W)`` or ``(B, 3, H, W)`` at the right and bottom to ``height`` and ``width`` by repeating the edge.

    A repeated edge looks less like an object than a black bar.
    """
    right, below = max(width - image.shape[-1], 0), max(height - image.shape[-2], 0)
    if not right and not below:
        return image
    padded = F.pad(image if image.ndim == 4 else image[None], (0, right, 0, below), mode="replicate")
    return padded if image.ndim == 4 else padded[0]
