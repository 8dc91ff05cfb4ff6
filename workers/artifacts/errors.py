"""Name what can go wrong with model artifacts. Every message is one line: what failed, and what to do."""


class ArtifactError(Exception):
    """Stop with one clear line."""


class UnknownModel(ArtifactError):
    """The name is not in the catalog."""


class FetchError(ArtifactError):
    """A source package could not be had, or does not hold what the catalog says."""


class ConversionError(ArtifactError):
    """The source holds something that the converter does not know."""


class DamagedModel(ArtifactError):
    """A converted model on disk is not what its manifest says."""
