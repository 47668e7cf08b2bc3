"""Pictures with captions, from any source that `dvae.data` opens."""

import numpy as np

from dvae.data import Part, Source, check_share, open_source


def open_pairs(name: str, size: int, max_bad: float = 0.01) -> Source:
    """The rows of a source that have both a usable picture and a caption; the others are `skipped`.

    Raises:
        DataError: no row is left, or the skipped ones are more than the share `max_bad` of what is listed.
    """
    pairs = pairs_of(open_source(name, size))
    check_share(pairs, max_bad)
    return pairs


def pairs_of(source: Source) -> Source:
    """The rows of an opened source that have a caption; those without one are skipped as "no caption"."""
    return Part(source, np.flatnonzero(source.captioned()), source.name, faulty=True, reason="no caption")
