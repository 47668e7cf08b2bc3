"""Pictures with captions, from any source that `dvae.data` opens."""

from dvae.data import Part, Source, check_share, open_source


def open_pairs(name: str, size: int, max_bad: float = 0.01) -> Source:
    """The rows of a source that have both a usable picture and a caption; the others are named in `skipped`.

    Raises:
        DataError: no row is left, or the skipped ones are more than the share `max_bad` of what is listed.
    """
    source = open_source(name, size)
    usable = [index for index in range(len(source)) if source.captions(index)]
    spoken = set(usable)
    silent = [(source.keys[index], "no caption") for index in range(len(source)) if index not in spoken]
    pairs = Part(source, usable, [*source.skipped, *silent], source.name)
    check_share(pairs, max_bad)
    return pairs
