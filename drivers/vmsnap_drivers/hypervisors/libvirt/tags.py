"""The tags of a domain: what its user wrote into its definition, for schedules.

libvirt has no tags of its own; what its users have are the title and the description, which every tool shows, and the
metadata element, in which an application keeps what is its own (libvirt.org/formatdomain.html#general-metadata)::

    virsh desc web1 --live --config '#nightly #gold the shop'
    virsh metadata web1 urn:vmsnap:tags --key vmsnap --set '<tags>nightly gold</tags>' --live --config
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

NAMESPACE = "urn:vmsnap:tags"

_TAG = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_HASHED = re.compile(rf"(?:^|(?<=[\s,;(]))#({_TAG})")
_PLAIN = re.compile(_TAG)


def tags_of(domain: ET.Element) -> tuple[str, ...]:
    """The tags in a domain's XML: the words of our metadata element, and ``#words`` in title and description; each
    once, sorted. What is no tag is left out.
    """
    found: set[str] = set()
    for element in domain.iterfind(f"metadata/{{{NAMESPACE}}}tags"):
        words = re.split(r"[\s,;]+", "".join(element.itertext()))
        found.update(word.removeprefix("#") for word in words if _PLAIN.fullmatch(word.removeprefix("#")))
    for name in ("title", "description"):
        found.update(_HASHED.findall(domain.findtext(name) or ""))
    return tuple(sorted(found))
