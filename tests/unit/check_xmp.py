#!/usr/bin/env python3
"""check_xmp.py FILE - holds XMP packets to Python's XML parser. FILE: model name, NUL, packet, NUL, ... Called by test_image.c."""
import re
import sys
import xml.etree.ElementTree as ElementTree

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
OURS = "{urn:safelight:xmp:1#}"

parts = open(sys.argv[1], "rb").read().split(b"\0")
assert parts.pop() == b"" and len(parts) >= 2000 and len(parts) % 2 == 0, len(parts)
for name, packet in zip(parts[::2], parts[1::2]):
    head, rest = packet.split(b"\n", 1)
    assert head == "<?xpacket begin=\"\ufeff\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>".encode() and rest.endswith(b"<?xpacket end=\"r\"?>")
    root = ElementTree.fromstring(packet)
    assert root.tag == "{adobe:ns:meta/}xmpmeta"
    (description,) = root.findall(f"{RDF}RDF/{RDF}Description")
    got = description.attrib
    assert got[IPTC + "DigitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert got[OURS + "GenerationId"] == "7-3fa9c1d2" and got[OURS + "ModelDigest"] == "abc"
    # How many U+FFFD stand for broken bytes is nobody's business.
    want = re.sub("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ufffd]+", "\ufffd", name.decode("utf-8", "replace"))
    assert re.sub("\ufffd+", "\ufffd", got.get(OURS + "Model", "")) == want, (name, packet)
