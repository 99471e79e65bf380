"""The typed errors of edge_moe; each message is one line that says what was found, what was expected and what to do."""


class EdgeMoeError(Exception):
    """Base of every error that bad input can cause; the command line prints it and exits with status 2."""


class FormatError(EdgeMoeError):
    """A file's content is damaged or contradicts itself."""


class UnsupportedError(EdgeMoeError):
    """A file is sound, but asks for something that edge_moe does not have."""


class OptionError(EdgeMoeError):
    """An argument or a command-line option has a value that cannot be used."""


class ShapeError(EdgeMoeError):
    """Arrays or token ids passed to the Python interface do not fit the model."""


class ReadError(EdgeMoeError):
    """A model's file could not be read, or changed, while it was in use."""


class DeviceError(EdgeMoeError):
    """A device beside the CPU is not there, was lost, or has too little memory."""
