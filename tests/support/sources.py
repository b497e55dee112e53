"""Sources for tests."""

from vadapter.data.example import Source


class ListSource(list, Source):
    """A list of examples as a source of images."""

    kind = "image"
