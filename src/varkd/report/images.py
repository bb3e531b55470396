"""Sample grids as data URIs, kept small enough for a page that is sent by mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from varkd.errors import VarkdError

_PAGE_BYTES = 2_700_000  # of image files on the whole page; base64 adds a third


@dataclass(frozen=True)
class Picture:
    """An image inside the page. `width` is in CSS pixels; `note` says when it is not the file's own bytes."""

    uri: str
    width: int
    height: int
    caption: str
    note: str


def pictures_of(paths: Sequence[Path], num_runs: int, share: float) -> list[Picture]:
    """Embed the files, each within a `share` of its run's part of the page.

    Raises:
        VarkdError: a file is not an image.
    """
    return [_picture(path, int(share * _PAGE_BYTES / max(num_runs, 1))) for path in paths]


def _picture(path: Path, limit: int) -> Picture:
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image, kind = opened.convert("RGB"), opened.format
    except (OSError, SyntaxError, ValueError) as error:
        raise VarkdError(f"{path} is not a readable image ({error}): make it again") from None
    width, height = image.size
    note = ""
    if kind != "PNG" or len(data) > limit:
        data, note = _compress(image, limit), "compressed to keep this page small"
    media = "jpeg" if note else "png"
    uri = f"data:image/{media};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, width, height, path.stem, note)


def _compress(image, limit: int) -> bytes:
    """JPEG at falling size until it fits."""
    from PIL import Image

    while True:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        if buffer.tell() <= limit or min(image.size) < 64:
            return buffer.getvalue()
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
