"""Images as files: lossless, with the facts of their making inside.

Every file carries, in the form its format has for it,

- XMP: that a model made the image (IPTC `DigitalSourceType`), and all facts as one JSON text (`darkroom:facts`);
- the text other tools read (AUTOMATIC1111's `parameters`): a PNG text chunk, or the EXIF user comment of a WebP.
"""

import hashlib
import io
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from tasks.errors import DarkroomError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("png", "webp")

XMP_CHUNK = "XML:com.adobe.xmp"
XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' xmlns:darkroom="urn:darkroom:xmp/1/"'
    ' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"'
    " darkroom:facts={facts}/></rdf:RDF></x:xmpmeta><?xpacket end='r'?>"
)
XMP_FACTS = "{urn:darkroom:xmp/1/}facts"

PARAMETERS_CHUNK = "parameters"
PARAMETERS_CANDIDATE = re.compile(r"Darkroom candidate: ([0-9a-f]{32})\b")
USER_COMMENT_UNICODE = b"UNICODE\0"  # EXIF 2.3, table 9: the character code of the comment that follows

A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpm++": "DPM++ 2M",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "unipc": "UniPC",
    "lcm": "LCM",
}


class NotAnImage(DarkroomError):
    """Bytes that should be an image are none."""


class Facts(TypedDict):
    """What an image file says about itself."""

    candidate_id: str
    recipe_id: str
    prompt: str
    negative_prompt: str
    seed: int
    sampler: str  # one of tasks.engines.SAMPLERS
    steps: int
    guidance: float
    width: int  # pixels
    height: int  # pixels
    model: str
    model_digest: str


def encode(pixels: "np.ndarray", facts: Facts, format: str = "png") -> bytes:
    """An image file of `pixels` uint8 [h, w, 3], lossless, with `facts` inside; `format` is one of FORMATS.

    PNG at the lowest compression level: a fifth of the time of Pillow's default, for files a tenth larger.
    """
    image = Image.fromarray(pixels)
    text = parameters(facts)
    xmp = XMP.format(facts=quoteattr(json.dumps(facts)))  # ASCII, with the characters escaped that XML cannot hold
    buffer = io.BytesIO()
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(XMP_CHUNK, xmp)
        chunks.add_text(PARAMETERS_CHUNK, text)
        image.save(buffer, "PNG", compress_level=1, pnginfo=chunks)
    elif format == "webp":
        exif = Image.Exif()
        comment = USER_COMMENT_UNICODE + text.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        image.save(buffer, "WEBP", lossless=True, method=0, quality=0, exif=exif, xmp=xmp.encode())
    else:
        raise ValueError(f"image format '{format}' is none of {FORMATS}")
    return buffer.getvalue()


def plain_png(pixels: "np.ndarray") -> bytes:
    """A PNG file of `pixels` uint8 [h, w, 3] that says nothing about itself: of what is no candidate."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parameters(facts: Facts) -> str:
    """The facts as AUTOMATIC1111 writes them: prompt, negative prompt, and a last line of named values."""
    values = {
        "Steps": facts["steps"],
        "Sampler": A1111_SAMPLERS.get(facts["sampler"], facts["sampler"]),
        "CFG scale": facts["guidance"],
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model": Path(facts["model"]).name,
        "Model hash": facts["model_digest"][:10],
        "Darkroom candidate": facts["candidate_id"],
        "Darkroom recipe": facts["recipe_id"],
    }
    negative = [f"Negative prompt: {facts['negative_prompt']}"] if facts["negative_prompt"] else []
    last = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    return "\n".join([facts["prompt"], *negative, last]).replace("\0", "")  # PNG text cannot hold NUL


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def decode(data: bytes) -> "np.ndarray":
    """The pixels of an image file: uint8 [h, w, 3]. Raises NotAnImage."""
    import numpy as np

    with _opened(data) as image:
        try:
            return np.array(of_8_bits(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's word for a broken PNG is SyntaxError
            raise NotAnImage(f"an image file of {len(data)} bytes is torn: {error}") from error


def size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file in pixels, by its head alone. Raises NotAnImage."""
    with _opened(data) as image:
        return image.size


def of_8_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits with 8: Pillow would cut them off at 255."""
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I;16") else image


def read_facts(data: bytes) -> Facts | dict[str, str]:
    """The facts inside an image file, as they were given to `encode`.

    Where another tool dropped the XMP but kept the `parameters`: only `candidate_id`. Where there are neither: nothing.
    Raises NotAnImage.
    """
    with _opened(data) as image:
        xmp, text = image.info.get("xmp", b""), image.info.get(PARAMETERS_CHUNK) or _user_comment(image)
    if facts := _xmp_facts(xmp):
        return json.loads(facts)
    last_line = text.rpartition("\n")[2]  # the prompt before it may hold anything
    return {"candidate_id": match[1]} if (match := PARAMETERS_CANDIDATE.search(last_line)) else {}


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise NotAnImage(f"{len(data)} bytes are not an image file: they begin with {data[:8]!r}") from error
    except Image.DecompressionBombError as error:
        raise NotAnImage(
            f"an image file of {len(data)} bytes is not opened, as it would fill the memory: {error} Scale it down, or leave it out"
        ) from error


def _xmp_facts(xmp: bytes) -> str | None:
    try:
        elements = ElementTree.fromstring(xmp).iter()
    except ElementTree.ParseError:
        return None
    return next((element.attrib[XMP_FACTS] for element in elements if XMP_FACTS in element.attrib), None)


def _user_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    return comment.removeprefix(USER_COMMENT_UNICODE).decode("utf-16-be", "replace")


def pixel_hash(pixels: "np.ndarray") -> str:
    """sha256 over width and height (two little-endian 32-bit integers) and the raw RGB bytes of uint8 [h, w, 3]."""
    height, width, _ = pixels.shape
    return hashlib.sha256(struct.pack("<II", width, height) + pixels.tobytes()).hexdigest()
