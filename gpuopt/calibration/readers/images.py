"""Folders of images, prepared as classification networks want them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpuopt.calibration.readers.base import Inputs, only_input
from gpuopt.calibration.readers.checks import Array
from gpuopt.calibration.readers.folders import FolderReader
from gpuopt.errors import DataError, RequirementError, UsageError, described
from gpuopt.shapes import TensorSpec, format_shape

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MOST_PIXELS = 80_000_000
"""Of one image; a file of some KiB can declare any number, and each takes several bytes when it is decoded."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageOptions:
    """How an image file becomes an input: upright by its EXIF, resize, crop, (pixels * scale - mean) / std, layout.

    Args:
        resize: length of the shorter side in pixels, bilinear. None: 256/224 of the crop where no
            crop was given either and the model states its height and width, else no resizing.
        crop: side of the square cut from the centre. None: the height and width that the model
            states, else no cropping.
        mean: one number, or one for each channel in the order of `color`. The default is
            ImageNet's and follows `color`: reversed for bgr, averaged for gray.
        std: as `mean`.
        scale: factor of the 8-bit pixels.
        layout: `nchw` or `nhwc`.
        color: `rgb`, `bgr` or `gray`.
        as_bytes: pixels stay 8-bit; `mean`, `std` and `scale` play no part.
        batch: images that make one sample. None: as many as the input's first axis states, else 1.

    Raises:
        UsageError: a value is out of range or unknown.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    scale: float = 1 / 255
    layout: str = "nchw"
    color: str = "rgb"
    as_bytes: bool = False
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("layout", self.layout, ("nchw", "nhwc")),
            ("color", self.color, ("rgb", "bgr", "gray")),
        ):
            if value not in choices:
                raise UsageError(f"image {name} '{value}' is unknown", f"Choose {' or '.join(choices)}.")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise UsageError(f"image {name} {size} is not a size", "Give a number of pixels.")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, self.channels) and tuple(numbers) not in (_MEAN, _STD):
                raise UsageError(
                    f"image {name} has {len(numbers)} numbers for {self.channels} channel(s)",
                    "Give one number, or one for each channel.",
                )
        if not all(value > 0 for value in self.std):
            raise UsageError("image std is not positive", "Give numbers above zero.")

    @property
    def channels(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.color == "gray" else 3

    def statistics(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and std as float32 arrays of 1 or `channels` elements, in the order of `color`."""
        found = []
        for values, default in ((tuple(self.mean), _MEAN), (tuple(self.std), _STD)):
            if values == default and self.color == "bgr":
                values = values[::-1]
            elif values == default and self.color == "gray":
                values = (math.fsum(values) / len(values),)
            found.append(np.array(values, np.float32))
        return found[0], found[1]


class ImageFolder(FolderReader):
    """Images of any size, for a model with one input of four axes; a fixed batch of n takes n of them in a sample."""

    def __init__(
        self, folder: Path, paths: Sequence[Path], inputs: Inputs, options: ImageOptions | None, limit: int | None
    ) -> None:
        spec = next(iter(inputs.values()), None)
        batch = (options.batch if options else None) or images_per_sample(inputs.values())
        if inputs and len(paths) < batch:
            raise DataError(
                f"{folder} holds {len(paths)} images, fewer than the {batch} of the input's fixed batch",
                "Give more images, or compile for a smaller batch or an open one.",
            )
        rows = [tuple(paths[start : start + batch]) for start in range(0, len(paths) - batch + 1, batch)]
        super().__init__("image", folder, rows, inputs, limit)
        if batch > 1:
            self.description += f" of {batch} images"
        self._leave(len(paths) % batch)
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise RequirementError(
                f"reading the images of {folder} needs Pillow, which is not installed", "pip install pillow"
            ) from error
        self._pillow, self._pillow_ops = Image, ImageOps
        self._name = only_input(
            inputs, f"a folder of images ({folder})", "Give a .npz keyed by input name, or package.module:callable."
        )
        if spec is not None and len(spec.shape) != 4:
            raise DataError(
                f"images of {folder} cannot feed input '{self._name}' of shape {format_shape(spec.shape)}",
                "Images need an input of four axes; give a .npz for this model.",
            )
        self._options = options or _options_for(spec)
        self._resize, self._crop = _geometry(self._options, spec)
        if options is None and self._crop is None:
            raise UsageError(
                f"the model does not state the height and width to which images of {folder} are cropped",
                "Give the image options resize and crop, for example resize 256 and crop 224.",
            )
        self.description += f"; {self._preparation()}"

    def _source(self, row: tuple[Path, ...]) -> str:
        first = str(row[0].relative_to(self._folder))
        return first if len(row) == 1 else f"{first} and {len(row) - 1} more"

    @property
    def gives_bytes(self) -> bool:
        """Whether pixels stay 8-bit."""
        return self._options.as_bytes

    def _preparation(self) -> str:
        """What is done to an image, in words for the report."""
        steps = [
            f"shorter side {self._resize}" if self._resize else "",
            f"crop {format_shape(self._crop)}" if self._crop else "",
        ]
        if self._options.as_bytes:
            steps.append("bytes")
        else:
            mean, std = (", ".join(f"{value:.3g}" for value in values) for values in self._options.statistics())
            steps += [f"scale {self._options.scale:.6g}", f"mean ({mean})", f"std ({std})"]
        return ", ".join(step for step in steps if step)

    def _load(self, row: tuple[Path, ...]) -> Mapping[str, Array]:
        """Images as float32 or uint8, N x C x H x W or N x H x W x C."""
        images = [self._image(path) for path in row]
        for path, image in zip(row, images, strict=True):
            if image.shape != images[0].shape:
                sizes = [format_shape(shape) for shape in (image.shape, images[0].shape)]
                raise DataError(
                    f"image {path} becomes {sizes[0]}, the first of its batch {sizes[1]}",
                    "Give the image option crop: the images of a fixed batch have one size.",
                )
        return {self._name: np.stack(images)}

    def _image(self, path: Path) -> Array:
        """One image, C x H x W or H x W x C."""
        options = self._options
        try:
            with self._pillow.open(path) as opened:
                if math.prod(opened.size) > _MOST_PIXELS:
                    raise ValueError(f"it declares {opened.size[0]}x{opened.size[1]} pixels, too many")
                opened.load()
                # What is no readable EXIF says nothing about the rotation, and viewers ignore it too.
                with contextlib.suppress(Exception):
                    self._pillow_ops.exif_transpose(opened, in_place=True)
                if opened.mode[0] in "IF":
                    # What does not fit into 8 bits would be cut off at 255.
                    raise ValueError(
                        f"its pixels (mode {opened.mode} of Pillow) are not 8 bits: save it with 8 bits, or give a .npz"
                    )
                picture = opened.convert("L" if options.color == "gray" else "RGB")
        except Exception as error:
            # Decoders fail on damaged bytes with whatever the format's parser happens to raise.
            raise DataError(
                f"image {path} cannot be read: {described(error)}",
                "Remove the file or save it again.",
            ) from error
        if self._resize is not None:
            width, height = picture.size
            size = tuple(self._resize * side // min(width, height) for side in (width, height))
            picture = picture.resize(size, self._pillow.Resampling.BILINEAR)
        if self._crop is not None:
            (width, height), (crop_height, crop_width) = picture.size, self._crop
            if width < crop_width or height < crop_height:
                raise DataError(
                    f"image {path} is {height}x{width}, smaller than the crop {crop_height}x{crop_width}",
                    "Give the image option resize, the length of the shorter side, at least as long as the crop.",
                )
            left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
            picture = picture.crop((left, top, left + crop_width, top + crop_height))
        pixels: Array = np.asarray(picture, np.uint8 if options.as_bytes else np.float32)
        if options.color == "gray":
            pixels = pixels[..., np.newaxis]
        elif options.color == "bgr":
            pixels = pixels[..., ::-1]
        if not options.as_bytes:
            mean, std = options.statistics()
            pixels = (pixels * np.float32(options.scale) - mean) / std
        return pixels.transpose(2, 0, 1) if options.layout == "nchw" else pixels


def images_per_sample(inputs: Iterable[TensorSpec]) -> int:
    """How many images make one sample: the batch of a model's only input, where it is fixed, else 1."""
    shapes = [spec.shape for spec in inputs]
    batch = shapes[0][0] if len(shapes) == 1 and len(shapes[0]) == 4 else 1
    return batch if isinstance(batch, int) else 1


def _options_for(spec: TensorSpec | None) -> ImageOptions:
    """Layout and colour as the input's shape suggests."""
    if spec is None:
        return ImageOptions()
    first, last = spec.shape[1], spec.shape[3]
    layout = "nhwc" if last in (1, 3) and first not in (1, 3) else "nchw"
    channels = last if layout == "nhwc" else first
    return ImageOptions(layout=layout, color="gray" if channels == 1 else "rgb")


def _geometry(options: ImageOptions, spec: TensorSpec | None) -> tuple[int | None, tuple[int, int] | None]:
    """Length of the shorter side, and height and width of the crop; None: left as it is."""
    if options.crop is not None:
        return options.resize, (options.crop, options.crop)
    if spec is not None:
        height, width = spec.shape[2:] if options.layout == "nchw" else spec.shape[1:3]
        if isinstance(height, int) and isinstance(width, int):
            return options.resize or round(max(height, width) * 256 / 224), (height, width)
    return options.resize, None
