"""Pictures that tests send."""
import io

from PIL import Image


def png(color):
    """64x64 in one colour, RGBA."""
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), color).save(out, "PNG")
    return out.getvalue()
