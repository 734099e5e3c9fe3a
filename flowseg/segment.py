"""Segment images with a trained network: code fields, label maps and margins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowseg.build import build
from flowseg.checkpoint import find_weights, load_weights
from flowseg.codes import MOST_CHANNELS, decode_one_hot
from flowseg.config import Config
from flowseg.data.datasets import resolve_labels
from flowseg.data.pictures import Reading, as_picture, stored_values
from flowseg.data.transforms import model_size, normalised, pad_to, pad_to_patches, prepare, resized
from flowseg.devices import to_device
from flowseg.flow import integrate, make_source
from flowseg.inference.graphs import Graphs
from flowseg.inference.network import SamplingNetwork
from flowseg.inference.views import (
    Part,
    Taps,
    Views,
    after,
    enlarge_labels,
    interpolated_columns,
    part_of,
    resizing,
    windows,
)
from flowseg.label_kinds import LabelKind, label_kind
from flowseg.model import FlowSegModel
from flowseg_kernels import Codebook, nearest_centroid


class Segmenter:
    """A network with its codes and settings, ready to segment images.

    Args:
        model: the network; it is in evaluation mode while it samples.
        codebook: codes of the classes.
        config: settings of sampling and data.
        device: device to compute on.
        compiled: compile the network for images of the training size. Other sizes run as they are: each would compile again.

    Sampling in bf16 keeps a copy of the network's weights in bf16, two bytes per number, which follows ``model``:
    :class:`flowseg.inference.network.SamplingNetwork`.
    """

    def __init__(
        self,
        model: FlowSegModel,
        codebook: Codebook,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        compiled: bool = False,
    ):
        self.device = torch.device(device)
        self.model, self.codebook, self.config = model.to(self.device), codebook.to(self.device), config
        self.compiled = compiled
        self._network, self._graphs = SamplingNetwork(), Graphs()

    @property
    def _kind(self) -> LabelKind:
        return label_kind(self.codebook.num_classes)

    @classmethod
    def from_run(
        cls,
        run: Path,
        config: Config,
        checkpoint: str = "latest",
        device: torch.device | str | None = None,
        *,
        compiled: bool = False,
    ) -> Segmenter:
        """Load a trained run.

        Args:
            run: folder written by training.
            config: settings of the run (:func:`flowseg.checkpoint.read_run_config`); sampling settings may differ.
            checkpoint: ``"latest"``, ``"best"``, a step number, or the path of a safetensors file or of a checkpoint.
            device: device to compute on; ``None``: the accelerator, or the CPU.
            compiled: as for the class.
        """
        path = find_weights(run, checkpoint, config.sample.weights)
        model, codebook = build(config, len(resolve_labels(config.data).classes))
        load_weights(model, path)
        return cls(model.eval(), codebook, config, device or default_device(), compiled=compiled)

    def refresh(self) -> None:
        """Read the network again at the next call.

        Needed only after a change that is not seen: a new value of a layer's attribute that is no tensor.
        """
        self._network.refresh()
        self._graphs.clear()

    def free_graphs(self) -> None:
        """Free the memory of CUDA graphs; they are recorded again when sampling goes on."""
        self._graphs.clear()

    def _records_graphs(self) -> bool:
        """Whether :meth:`sample` replays CUDA graphs: ``sample.cuda_graph`` is on and the device is a CUDA GPU."""
        return self.config.sample.cuda_graph and self.device.type == "cuda"

    @torch.no_grad()
    def sample(self, images: Tensor, *, seed: int = 0, steps: int | None = None, keep_path: bool = False):
        """Run the flow on prepared images.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            seed: seed of a noise source.
            steps: number of solver steps; ``None``: ``sample.steps`` of the settings.
            keep_path: also return the states ``(t, x)`` on the way.

        Returns:
            The code field ``(B, C, H, W)`` float32 at t = 1; with ``keep_path`` also the list of states.
        """
        flow, sample = self.config.flow, self.config.sample
        images = to_device(images, self.device)
        generator = torch.Generator().manual_seed(seed)
        # All images get the same noise, so a result does not depend on the other images of the batch.
        count = 1 if flow.source == "noise" else len(images)
        source = make_source(images[:count], self.config.codes.channels, flow.source, generator).expand(
            len(images), -1, -1, -1
        )
        precision = resolve_precision(self.config.train.mixed_precision, self.device)
        network = self._network.of(self.model, cast=precision == "bf16")
        structure = self._network.structure
        compiled = (
            self.compiled and structure and images.shape[-2:] == (self.config.data.height, self.config.data.width)
        )
        if compiled:
            # A source that is the image itself, or a view of one example, would be a case of its own for the compiler.
            source = source.clone(memory_format=torch.contiguous_format)
        inputs = (source, images) if self.model.condition_on_image else (source,)
        call = self._network.compiled(network, images) if compiled else network
        options = {
            "steps": steps or sample.steps,
            "method": sample.method,
            "predicts": flow.predicts,
            "t_min": flow.t_min,
        }

        def solve(source: Tensor, condition: Tensor | None = None):
            with autocast(precision, self.device):
                return integrate(lambda x, t: call(x, t, condition).float(), source, keep_path=keep_path, **options)

        # A copy is always in evaluation mode.
        with _evaluating(network) if network is self.model else contextlib.nullcontext():
            if self._records_graphs() and structure and not keep_path:
                return self._graphs.run(structure, (precision, compiled, *options.values()), solve, *inputs)
            return solve(*inputs)

    def prepare_batch(self, images: Sequence[Image.Image], scale: float = 1.0) -> tuple[Tensor, tuple[int, int]]:
        """Stack images of equal size into a batch. Return the batch and the size ``(h, w)`` of its part without padding."""
        size = model_size(images[0].size[::-1], self.config.data, self.config.sample.resize, scale)
        return torch.stack([prepare(image, size, self.model.size.patch_size) for image in images]), size

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of equal size as ``(B, 3, H, W)`` float32 in [-1, 1] on the device. They travel there as bytes."""
        pixels = torch.from_numpy(np.stack([np.asarray(image, np.uint8) for image in images]))
        return normalised(to_device(pixels, self.device).permute(0, 3, 1, 2).contiguous())

    def _patched(self, images: Sequence[Image.Image]) -> Tensor:
        """:meth:`_pixels` with the edge repeated up to whole patches."""
        return pad_to_patches(self._pixels(images), self.model.size.patch_size)

    def native_field(self, images: Sequence[Image.Image]) -> Tensor:
        """Code fields at native resolution for images of equal size; the nearest codes are the labels.

        ``sample.upsample`` selects the method for a single view. ``"codes"`` interpolates the code field bilinearly.
        ``"labels"`` repeats the nearest pixel, which gives the same labels as decoding first. ``"probabilities"``
        interpolates normalised class probabilities ``1/(d_k + eps)`` and returns the code of the most probable class.
        Several views (windows, mirror image, scales) are always averaged as probabilities, because the mean of two codes is
        the code of neither class.

        A field needs memory for C numbers per pixel; :meth:`labels` and :meth:`native_labels` give the same labels with less.

        Args:
            images: RGB images of equal size.

        Returns:
            ``(B, C, H, W)`` float32.
        """
        sample = self.config.sample
        native = images[0].size[::-1]
        if self.several_views:
            return torch.stack([self._as_codes(self._labels_of_views(image, native)) for image in images])
        height, width = size = model_size(native, self.config.data, sample.resize)
        field = self.sample(self._patched([resized(image, size) for image in images]))[..., :height, :width]
        if field.shape[-2:] == native:
            return field
        if sample.upsample == "codes":
            return F.interpolate(field, size=native, mode="bilinear", align_corners=False)
        if sample.upsample == "labels":
            return F.interpolate(field, size=native, mode="nearest-exact")
        return torch.stack([self._as_codes(self._resized_labels(one, native)) for one in field])

    @property
    def several_views(self) -> bool:
        """Whether the result for an image is the mean of several views: windows, mirror images or scales."""
        sample = self.config.sample
        return sample.window == "slide" or sample.flip or list(sample.scales) != [1.0]

    def seen(self, image: Image.Image) -> Image.Image:
        """The image as :meth:`native_labels` expects it: resized for the network, or unchanged for several views."""
        if self.several_views:
            return image
        height, width = model_size(image.size[::-1], self.config.data, self.config.sample.resize)
        return resized(image, (height, width))

    def native_labels(
        self, images: Sequence[Image.Image], native: tuple[int, int], *, with_margin: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield labels ``(H, W)`` and, with ``with_margin``, margins ``(H, W)`` float32 at native size.

        Labels are uint8, and pixels that decode to no class (NaN) are 255; with more than 255 classes they are int32 and
        65535. Apart from the results, memory does not grow with the native size:
        labels are decoded before they are enlarged if ``sample.upsample`` is ``"labels"``, and in parts otherwise.

        Args:
            images: images of equal size, as :meth:`seen` returns them.
            native: their size ``(H, W)`` before :meth:`seen`.
            with_margin: also yield the margin, the second smallest distance to a code minus the smallest; else ``None``.
        """
        if self.several_views:
            for image in images:
                labels = self._labels_of_views(image, native)
                yield labels, self._margin_of_codes(labels) if with_margin else None
            return
        size = images[0].size[::-1]
        for field in self.sample(self._patched(images))[..., : size[0], : size[1]]:
            yield self._labels_of_field(field, native, with_margin)

    def _labels_of_field(
        self, field: Tensor, native: tuple[int, int], with_margin: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Labels and margins at native size for a field ``(C, h, w)``."""
        upsample = self.config.sample.upsample
        if tuple(field.shape[-2:]) == native:
            return self._decode(field, with_margin)
        if upsample == "labels":
            labels, margin = self._decode(field, with_margin)
            return enlarge_labels(labels, native), margin if margin is None else enlarge_labels(margin, native)
        if upsample == "probabilities":
            labels = self._resized_labels(field, native)
            return labels, self._margin_of_codes(labels) if with_margin else None
        labels = torch.empty(native, dtype=self._kind.dtype, device=field.device)
        margin = torch.empty(native, device=field.device) if with_margin else None
        for columns, part in interpolated_columns(field, native):
            labels[:, columns], found = self._decode(part, with_margin)
            if margin is not None:
                margin[:, columns] = found
        return labels, margin

    def _resized_labels(self, field: Tensor, native: tuple[int, int]) -> Tensor:
        """Labels ``(H, W)`` after bilinear interpolation of the class probabilities of a field ``(C, h, w)``."""
        sides = [
            part_of(resizing(old, new), slice(0, old), torch.ones(old)) for old, new in zip(field.shape[1:], native)
        ]
        return self._views.labels([iter([Part.of(field, *sides)])], native)

    def _decode(self, field: Tensor, with_margin: bool) -> tuple[Tensor, Tensor | None]:
        kind = self._kind
        if self.config.codes.sequence == "one_hot" and len(field) > MOST_CHANNELS:
            labels, margin = decode_one_hot(field, with_margin=with_margin)
            return labels.to(kind.dtype), margin
        # A codebook that a caller made may have another ignored label.
        options = {"out_dtype": kind.dtype, "ignore_index": kind.ignore, "return_margin": with_margin}
        found = nearest_centroid(field[None], self.codebook, **options)
        return (found[0][0], found[1][0]) if with_margin else (found[0], None)

    def _margin_of_codes(self, labels: Tensor) -> Tensor:
        """Margins of pixels that lie exactly on the codes of their labels; NaN for the ignored label."""
        codes = self.codebook.centroids.float().T[:, None]
        margins = self._decode(codes, True)[1][0]
        margins = torch.cat([margins, margins.new_full((self._kind.ignore + 1 - len(margins),), torch.nan)])
        result = torch.empty(labels.shape, device=labels.device)
        for source, target in zip(labels.split(1024), result.split(1024)):
            target.copy_(margins[source.int()])
        return result

    def _labels_of_views(self, image: Image.Image, native: tuple[int, int]) -> Tensor:
        """Labels ``(H, W)`` from the mean of all views."""
        sample = self.config.sample
        size = model_size(native, self.config.data, sample.resize, sample.scales[0])
        result = size if sample.upsample == "labels" else native
        mirrors = (False, True) if sample.flip else (False,)
        views = [self._parts(image, scale, mirrored, size, result) for scale in sample.scales for mirrored in mirrors]
        labels = self._views.labels(views, result)
        return labels if result == native else enlarge_labels(labels, native)

    @property
    def _views(self) -> Views:
        return Views(self.codebook, self.config.loss.eps)

    def _parts(
        self, image: Image.Image, scale: float, mirrored: bool, size: tuple[int, int], result: tuple[int, int]
    ) -> Iterator[Part]:
        """Yield the parts of one view by their rows: its windows, or the whole image.

        Args:
            image: the image at its own size.
            scale: multiple of the size to segment at.
            mirrored: whether the network sees the mirror image.
            size: ``(h, w)``, to which probabilities of another scale are resized.
            result: ``(H, W)``, to which probabilities are resized then.
        """
        own = model_size(image.size[::-1], self.config.data, self.config.sample.resize, scale)
        image = resized(image, own)
        rows, columns = (
            after(resizing(old, middle, antialias=True), resizing(middle, new))
            for old, middle, new in zip(own, size, result)
        )
        if mirrored:
            columns = Taps(own[1] - 1 - columns.index, columns.weight)
        if self.config.sample.window == "slide":
            shares = [1 / overlaps for overlaps in self._overlaps(own)]
            fields = self._window_fields(image, mirrored)
        else:
            shares = [torch.ones(side) for side in own]
            fields = iter([((slice(0, own[0]), slice(0, own[1])), self._whole_field(image, mirrored))])
        for (top, left), field in fields:
            place = (slice(top.start, top.start + field.shape[1]), slice(left.start, left.start + field.shape[2]))
            yield Part.of(field, *(part_of(*part) for part in zip((rows, columns), place, shares)))

    def _whole_field(self, image: Image.Image, mirrored: bool) -> Tensor:
        """The field ``(C, h, w)`` of an image or of its mirror image."""
        pixels = self._pixels([image])
        # Mirror before padding, to keep the padding on the same sides.
        pixels = pad_to_patches(pixels.flip(-1) if mirrored else pixels, self.model.size.patch_size)
        return self.sample(pixels)[0, :, : image.height, : image.width]

    def _window_fields(self, image: Image.Image, mirrored: bool) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Yield the slices and the field ``(C, h, w)`` of each window of an image or of its mirror image.

        Only the pixels of one batch of windows are tensors at a time.
        """
        window = self.config.data.height, self.config.data.width
        batch_size = self.config.sample.batch_size
        places = self._places(image.size[::-1])
        for first in range(0, len(places), batch_size):
            some = places[first : first + batch_size]
            batch = []
            for rows, columns in some:
                left, right = columns.start, min(columns.stop, image.width)
                if mirrored:
                    left, right = image.width - right, image.width - left
                batch.append(image.crop((left, rows.start, right, min(rows.stop, image.height))))
            # All windows are equally large: an axis shorter than a window has only one.
            pixels = self._pixels(batch)
            pixels = pad_to(pixels.flip(-1) if mirrored else pixels, *window)
            # If the image is smaller than a window, cut the padding off.
            for (rows, columns), field in zip(some, self.sample(pixels)):
                yield (rows, columns), field[:, : image.height - rows.start, : image.width - columns.start]

    def _places(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Slices of the windows over an image of ``size``; a smaller image counts as padded to one window."""
        window = self.config.data.height, self.config.data.width
        stride = tuple(max(1, round(side * self.config.sample.stride)) for side in window)
        return windows(max(size[0], window[0]), max(size[1], window[1]), window, stride)

    def _overlaps(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The number of windows over each row and over each column of an image of ``size``."""
        places = self._places(size)
        counts = torch.zeros(max(size[0], places[-1][0].stop)), torch.zeros(max(size[1], places[-1][1].stop))
        for count, starts in zip(counts, zip(*places)):
            for start, stop in {(side.start, side.stop) for side in starts}:
                count[start:stop] += 1
        return counts[0][: size[0]], counts[1][: size[1]]

    def _as_codes(self, labels: Tensor) -> Tensor:
        """Codes ``(C, H, W)`` of labels; NaN for the ignored label."""
        codes = self.codebook.centroids
        nothing = codes.new_full((self._kind.ignore + 1 - len(codes), codes.shape[1]), torch.nan)
        return torch.cat([codes, nothing])[labels.long()].movedim(-1, 0)

    def labels(self, image: Image.Image | np.ndarray | Path | str, *, with_margin: bool = False):
        """Segment one image at its own size.

        Args:
            image: a Pillow image of any mode, a numpy array ``(H, W, 3)`` uint8 (or with alpha, or grey), or a path. The
                labels of a path match the image as a viewer shows it, or with ``data.exif=stored`` its stored pixels.
            with_margin: also return the margin: the second smallest distance to a code minus the smallest.

        Returns:
            Label map ``(H, W)`` on the CPU, uint8 or with more than 255 classes int32; with ``with_margin`` also the margin
            ``(H, W)`` float32.

        Raises:
            UserError: the image has another type, or its file cannot be read.
        """
        reading = Reading.of(self.config.data)
        picture, shape = as_picture(image, reading)
        seen, native = self.seen(picture), picture.size[::-1]
        found = next(self.native_labels([seen], native, with_margin=with_margin))
        found = [part.cpu() for part in found if part is not None]
        if reading.exif == "stored" and shape.orientation != 1:
            found = [torch.from_numpy(stored_values(part.numpy(), shape.orientation).copy()) for part in found]
        return tuple(found) if with_margin else found[0]


@contextlib.contextmanager
def _evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a block."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def resolve_precision(name: str, device: torch.device) -> str:
    """``"no"`` or ``"bf16"``; ``"auto"`` becomes ``"bf16"`` if the device multiplies bf16 in hardware."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        facts = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if facts.get("avx512_bf16") or facts.get("amx_bf16") else "no"
    return "no"


def autocast(precision: str, device: torch.device):
    """Context manager for calls of the network: bf16 autocast, or none."""
    if resolve_precision(precision, device) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
