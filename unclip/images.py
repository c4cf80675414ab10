"""Pictures from files that people have: turned upright, on white, of a size that fits into memory."""

import logging
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000


def open_image(path: str | Path) -> Image.Image:
    """A picture file as RGB: turned as its EXIF data says, transparency on white, of an animation the first frame.

    Raises ValueError, naming the file, for one that is missing, no picture, empty, damaged or of more than 100 megapixels.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(
                        f"{path} has {file.width}x{file.height} pixels, more than {MAX_PIXELS // 10**6} megapixels"
                    )
                if getattr(file, "n_frames", 1) > 1:
                    logger.warning("%s is animated; its first frame is taken", path)
                picture = ImageOps.exif_transpose(file)
                picture.load()
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MAX_PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that can be read") from None
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's answers to truncated and damaged files
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    return on_white(picture)


def on_white(picture: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16 bits scaled to 8."""
    if picture.mode.startswith(("I", "F")):
        picture = picture.convert("F")
        low, high = picture.getextrema()
        scale = 255 / 65535 if high > 255 else 1.0 if high > 1 or low < 0 else 255
        return picture.point(lambda v: v * scale).convert("L").convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def square(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, `size` pixels a side."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
