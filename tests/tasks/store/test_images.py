import io
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tasks.store.images import FORMATS, Facts, NotAnImage, decode, encode, parameters, pixel_hash, read_facts, size

FACTS = Facts(
    candidate_id="0123456789abcdef0123456789abcdef",
    recipe_id="fedcba9876543210fedcba9876543210",
    prompt="a large red circle, on blue",
    negative_prompt="blurry",
    seed=2**52 - 1,
    sampler="dpm++",
    steps=20,
    guidance=3.5,
    width=24,
    height=16,
    model="some/folder/tiny-sd",
    model_digest="00112233445566778899aabbccddeeff",
)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=200) | st.sampled_from(
    [
        'say "hi" & <b>',
        "two\nlines\nSteps: 1, Sampler: x, Seed: 2",
        "Negative prompt: ha",
        "日本 🐈\x00\x07\ufffe",
        "]]>",
    ]
)


@pytest.mark.parametrize("format", FORMATS)
def test_pixels_survive_the_file(format: str) -> None:
    data = encode(PIXELS, FACTS, format)
    assert np.array_equal(decode(data), PIXELS)
    assert Image.open(io.BytesIO(data)).format == format.upper()


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60)
@given(prompt=TEXT, negative=TEXT)
def test_facts_survive_whatever_the_prompt_holds(format: str, prompt: str, negative: str) -> None:
    facts = Facts(**{**FACTS, "prompt": prompt, "negative_prompt": negative})
    assert read_facts(encode(PIXELS, facts, format)) == facts


def test_other_tools_find_the_text_they_read() -> None:
    """The form that AUTOMATIC1111 writes and parses: prompt, negative prompt, a last line of `name: value` pairs."""
    image = Image.open(io.BytesIO(encode(PIXELS, FACTS)))
    assert image.info["parameters"] == (
        "a large red circle, on blue\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 3.5, Seed: 4503599627370495, Size: 24x16, Model: tiny-sd, "
        "Model hash: 0011223344, Darkroom candidate: 0123456789abcdef0123456789abcdef, "
        "Darkroom recipe: fedcba9876543210fedcba9876543210"
    )
    assert "Negative prompt" not in parameters(Facts(**{**FACTS, "negative_prompt": ""}))
    assert 'Model: "a, b: c"' in parameters(Facts(**{**FACTS, "model": "a, b: c"}))


def test_webp_carries_the_same_text_in_its_user_comment() -> None:
    exif = Image.open(io.BytesIO(encode(PIXELS, FACTS, "webp"))).getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + parameters(FACTS).encode("utf-16-be")


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_that_a_model_made_it(format: str) -> None:
    xmp = ElementTree.fromstring(Image.open(io.BytesIO(encode(PIXELS, FACTS, format))).info["xmp"])
    description = xmp.find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description is not None
    assert description.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_the_candidate_is_found_where_another_tool_dropped_the_xmp(format: str) -> None:
    facts = Facts(**{**FACTS, "prompt": "not Darkroom candidate: " + "f" * 32})
    image = Image.open(io.BytesIO(encode(PIXELS, facts, format)))
    saved, chunks = io.BytesIO(), PngInfo()
    chunks.add_text("parameters", parameters(facts))
    kept = {"pnginfo": chunks} if format == "png" else {"exif": image.getexif(), "xmp": b""}
    image.save(saved, format, **kept)
    assert read_facts(saved.getvalue()) == {"candidate_id": FACTS["candidate_id"]}


def test_a_foreign_image_has_no_facts() -> None:
    saved = io.BytesIO()
    Image.fromarray(PIXELS).save(saved, "PNG")
    assert read_facts(saved.getvalue()) == {}


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(NotAnImage, match="begin with b'PAR1'"):
        read_facts(b"PAR1")
    with pytest.raises(NotAnImage, match="torn"):
        decode(encode(PIXELS, FACTS)[:-200])


@pytest.mark.parametrize("format", FORMATS)
def test_the_size_is_read_from_the_head_alone(format: str) -> None:
    data = encode(PIXELS, FACTS, format)
    assert size(data) == (PIXELS.shape[1], PIXELS.shape[0])
    assert size(encode(PIXELS, FACTS)[:-200]) == size(data)  # torn
    with pytest.raises(NotAnImage, match="not an image file"):
        size(b"no image")


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bits_of_grey_become_8(byteorder: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    saved = io.BytesIO()
    Image.fromarray((levels * 257).astype(f"{byteorder}u2")).save(saved, "TIFF" if byteorder == ">" else "PNG")
    assert np.array_equal(decode(saved.getvalue()), levels.astype(np.uint8)[..., None].repeat(3, 2))


def test_an_image_that_would_fill_the_memory_is_not_opened() -> None:
    saved = io.BytesIO()
    Image.fromarray(PIXELS).save(saved, "PNG")
    data = bytearray(saved.getvalue())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for read in (decode, read_facts):
        with pytest.raises(NotAnImage, match=r"400000000 pixels.*Scale it down"):
            read(bytes(data))


def test_the_pixel_hash_is_of_shape_and_pixels() -> None:
    assert pixel_hash(PIXELS) == pixel_hash(decode(encode(PIXELS, FACTS, "webp")))
    assert pixel_hash(PIXELS) != pixel_hash(PIXELS.reshape(24, 16, 3))
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    assert pixel_hash(changed) != pixel_hash(PIXELS)
    assert pixel_hash(PIXELS[:, ::2]) == pixel_hash(np.ascontiguousarray(PIXELS[:, ::2]))
