"""Reading images of many formats, upright, on white and of a bounded size; and metadata in PNG files."""

import io
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr, unescape

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
# Limits of uploads: such files decode within a second or two, whatever they contain.
UPLOAD_BYTES, UPLOAD_PIXELS, UPLOAD_SCANS = 10 * 2**20, 4096 * 4096, 64
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
XMP_CHUNK = "XML:com.adobe.xmp"  # the keyword of a PNG's text chunk with XMP
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
OWN_NAMES = "urn:unclip:settings"
QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 90}}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def open_image(source: str | Path | io.BytesIO, name: str | None = None) -> Image.Image:
    """An image file, or its bytes, as RGB: rotated by its EXIF data, on white; the first frame of an animation.

    Raises ValueError, naming the file, for one that is missing, no image, empty, damaged or of more than 100 megapixels.
    """
    if not isinstance(source, io.BytesIO):
        source = Path(source).expanduser()
        if not source.is_file():
            raise ValueError(f"{source} is not a file")
    return on_white(_load(source, source if isinstance(source, Path) else name, MAX_PIXELS))


def open_upload(data: bytes, name: str) -> Image.Image:
    """An untrusted image, its format detected from its content: PNG, JPEG or WebP, upright, in the file's mode (with alpha).

    The cost of decoding is limited before it begins: 10 MiB, 16 megapixels, and for JPEG 64 scans, each of which
    processes all pixels. Raises ValueError, calling it `name`, above these limits and as `open_image` does.
    """
    if len(data) > UPLOAD_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, more than {UPLOAD_BYTES // 2**20} MiB")
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > UPLOAD_SCANS:
        raise ValueError(f"{name} is a JPEG of more than {UPLOAD_SCANS} scans")
    return _load(io.BytesIO(data), name, UPLOAD_PIXELS, UPLOAD_FORMATS)


def _load(
    source: Path | io.BytesIO, name: str | Path | None, pixels: int, formats: tuple[str, ...] | None = None
) -> Image.Image:
    size = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=formats) as file:
                if file.width * file.height > pixels:
                    size = f"{file.width}x{file.height} pixels, "
                    raise Image.DecompressionBombError
                if getattr(file, "n_frames", 1) > 1:
                    logger.warning("%s is animated; its first frame is taken", name)
                image = ImageOps.exif_transpose(file)
                image.load()
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has {size}more than {pixels // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read" + (f" ({', '.join(formats)})" if formats else "")) from None
    except Exception as error:  # Pillow raises many kinds for truncated, damaged and hostile files
        raise ValueError(f"{name} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return image


def on_white(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16 bits scaled to 8."""
    if image.mode.startswith(("I", "F")):
        image = image.convert("F")
        low, high = (float(bound) for bound in np.asarray(image.getextrema()))
        scale = 255 / 65535 if high > 255 else 1.0 if high > 1 or low < 0 else 255
        return image.point(lambda v: v * scale).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, `size` pixels a side."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def limit_aspect_ratio(image: Image.Image, most: int = 16) -> Image.Image:
    """The middle of an image, at most `most` times as long as it is wide: 1 by 100,000 px would take gigabytes when resized."""
    longest = most * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def with_margins(image: Image.Image, left: int, right: int, top: int, bottom: int) -> tuple[Image.Image, Image.Image]:
    """An image on a larger canvas and the mask of the new part (white), for outpainting; margins in pixels of the image."""
    margins = {"left": left, "right": right, "top": top, "bottom": bottom}
    wrong = [f"{name} {value}" for name, value in margins.items() if value < 0]
    if wrong or not any(margins.values()):
        raise ValueError(f"margins must be at least 0 and not all 0, got {', '.join(wrong) or 'four zeros'}")
    size = (image.width + left + right, image.height + top + bottom)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are more than {MAX_PIXELS // 10**6} megapixels")
    canvas, mask = Image.new("RGB", size, "white"), Image.new("L", size, 255)
    canvas.paste(on_white(image), (left, top))
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return canvas, mask


def cut_out(image: Image.Image, tolerance: int = 24) -> Image.Image:
    """An image on white as RGBA, with a transparent background; white areas that the foreground encloses stay.

    The background is what is connected to the border through pixels that differ from white by at most `tolerance` levels. In
    the few pixels beside it the colour is modelled as a mixture of white and the darkest colour near by, and unmixed: on
    white the result looks as before.
    """
    pixels = np.array(on_white(image)).astype(np.float32)  # [H, W, 3]
    darkness = 255 - pixels.min(2)
    around = _reached_from_border(darkness <= tolerance)
    width = 2 * max(round(max(image.size) / 256), 1) + 1  # of an edge's soft part, in pixels
    band = np.array(Image.fromarray(around).convert("L").filter(ImageFilter.MaxFilter(width))) > 0
    near = np.array(Image.fromarray(darkness.astype(np.uint8)).filter(ImageFilter.MaxFilter(width))).astype(np.float32)
    alpha = np.where(band & (near > 0), darkness / np.maximum(near, 1), 1.0)
    alpha = np.where(around, 0.0, np.round(alpha * 255) / 255)[..., None]
    colour = np.clip(255 - (255 - pixels) / np.maximum(alpha, 1 / 255), 0, 255)
    return Image.fromarray(np.concatenate([colour, alpha * 255], 2).round().astype(np.uint8), "RGBA")


def _reached_from_border(free: np.ndarray) -> np.ndarray:
    """The part of `free` [H, W] that is connected to the border, along rows and columns, one run of pixels at a time."""
    reached = np.zeros_like(free)
    reached[[0, -1]], reached[:, [0, -1]] = free[[0, -1]], free[:, [0, -1]]
    count = -1
    while reached.sum() != count:
        count = reached.sum()
        for axis in (0, 1):
            blocked, seen = (~free, reached) if axis == 1 else (~free.T, reached.T)
            run = blocked.cumsum(1) + np.arange(len(blocked))[:, None] * (blocked.shape[1] + 1)  # a number for each run
            hit = np.zeros(run.max() + 1, bool)
            hit[run[seen]] = True
            seen = hit[run] & ~blocked
            reached = seen if axis == 1 else seen.T
    return reached


def save_image(
    image: Image.Image, file: Path | io.BytesIO, facts: Mapping[str, str] | None = None, format: str = "PNG"
) -> None:
    """Write a PNG, JPEG or WebP that says that it is synthetic and, where given, the settings that it was sampled with.

    A PNG has the settings in text chunks, the others in XMP, where all three have IPTC's digital source type. Raises
    ValueError for another format.
    """
    if format == "PNG":
        image.save(file, format=format, pnginfo=png_facts(facts))
    elif format in ("JPEG", "WEBP"):
        image.save(file, format=format, xmp=xmp_packet(_with_version(facts)), **QUALITY[format])
    else:
        raise ValueError(f"format must be PNG, JPEG or WEBP, got {format!r}")


def png_facts(facts: Mapping[str, str] | None = None) -> PngInfo:
    """Chunks for `Image.save(pnginfo=)`: XMP that says that an image is synthetic and, as texts, the settings that it was
    sampled with and this package's version. Without settings (None) there are no texts.
    """
    info = PngInfo()
    for key, value in _with_version(facts).items():
        info.add_itxt(key, value.encode(errors="replace").decode())  # a file's name may not be valid Unicode
    info.add_itxt(XMP_CHUNK, xmp_packet({}).decode())
    return info


def _with_version(facts: Mapping[str, str] | None) -> dict[str, str]:
    from .. import __version__

    return {} if facts is None else {**facts, "version": __version__}


def xmp_packet(facts: Mapping[str, str]) -> bytes:
    """XMP with IPTC's `digitalSourceType` = trainedAlgorithmicMedia, and with `facts` as properties of this package's.

    Source: IPTC Photo Metadata Standard 2023.2; Adobe's XMP specification, part 1, section 7.
    """
    kept = {name: value.encode(errors="replace").decode() for name, value in facts.items()}
    own = "".join(f" unclip:{name}={quoteattr(_without_controls(value))}" for name, value in kept.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{IPTC}" xmlns:unclip="{OWN_NAMES}"'
        f' Iptc4xmpExt:DigitalSourceType="{SYNTHETIC}"{own}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _without_controls(text: str) -> str:
    """XML 1.0 has no control characters but tab, line feed and carriage return."""
    return "".join(c if c >= " " or c in "\t\n\r" else "\ufffd" for c in text)


def open_with_metadata(source: Path) -> Image.Image:
    """An image file as it is, with its metadata. Raises ValueError, naming the file, for what `open_image` raises it for."""
    source = source.expanduser()
    if not source.is_file():
        raise ValueError(f"{source} is not a file")
    _load(source, source, MAX_PIXELS)  # complains of what cannot be read
    with Image.open(source) as file:
        file.load()  # a PNG's text may stand behind its pixels
        return file


def stated(image: Image.Image) -> dict[str, str]:
    """What an opened image file says of itself: `digital_source_type`, and the settings that it was sampled with."""
    text = image.info.get(XMP_CHUNK) or image.info.get("xmp") or b""
    found = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str) and k != XMP_CHUNK}
    packet = text.decode(errors="replace") if isinstance(text, bytes) else text
    for name, quoted, bare in re.findall(r"""([\w]+:[\w.-]+)=(?:"([^"]*)"|'([^']*)')""", packet):
        prefix, key = name.split(":")
        value = unescape(quoted or bare, {"&quot;": '"', "&apos;": "'", "&#10;": "\n", "&#9;": "\t", "&#13;": "\r"})
        if key == "DigitalSourceType":
            found["digital_source_type"] = value.rsplit("/", 1)[-1]
        elif prefix == "unclip":
            found[key] = value
    return found


def read_facts(data: bytes, name: str) -> dict[str, str]:
    """What `png_facts` wrote into a PNG file. Raises ValueError, calling it `name`, where it wrote none, or for no image."""
    image = open_upload(data, name)
    facts = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str) and k != XMP_CHUNK}
    if "version" not in facts:
        raise ValueError(f"{name} does not say how it was made: it is no PNG that unclip drew, or was converted since")
    return facts
