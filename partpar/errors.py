r"""The errors that partpar raises for what a user can mend. Each message says what was expected, what was found and what to do."""


class PartparError(Exception):
    r"""Base of all errors that partpar raises on purpose."""


class GraphError(PartparError, ValueError):
    r"""A graph, a frame or an attribute is not what it should be."""


class PartitionError(PartparError, ValueError):
    r"""Arguments of a partition do not fit the graph or each other."""


class PartitionExistsError(PartitionError, FileExistsError):
    r"""A different partition already stands where one was to be written."""


class PartitionFileError(PartparError, ValueError):
    r"""A file of a partition is damaged, foreign, too new or not what its manifest says."""


class MissingPartitionError(PartitionFileError, FileNotFoundError):
    r"""A partition, or a file of it, is not where it was looked for."""


class RouteError(PartparError, ValueError):
    r"""Rows given to a route, or ids given to build one, do not fit it."""


class AgreementError(RouteError):
    r"""Ranks disagree on something that all of them must pass alike."""


class SamplingError(PartparError, ValueError):
    r"""Seeds, fan-outs, attributes or ids given to a sampler do not fit the graph or each other."""


class StaleIteratorError(PartparError, RuntimeError):
    r"""What is read is an epoch of a loader that has begun another one since."""


class IdError(RouteError, IndexError):
    r"""An id is not that of a row."""


class ServiceError(PartparError, RuntimeError):
    r"""The service of shares could not be started, or was asked for what it does not do."""


class RemoteError(ServiceError):
    r"""A verb failed at the part that was asked; the message holds the part's name and the traceback there."""


class PeerLostError(ServiceError, ConnectionError):
    r"""A part that was asked did not answer in time, or is gone; the message holds its name."""


class CheckpointError(PartparError, ValueError):
    r"""A checkpoint does not fit what is to go on from it, or what is to be kept cannot be."""


class DamagedCheckpointError(CheckpointError):
    r"""A file of a checkpoint is missing, cut short, or not what its checksum says."""


class CheckpointWriteError(CheckpointError, OSError):
    r"""A checkpoint could not be written; the one before stands."""


class RankLostError(PartparError, RuntimeError):
    r"""A rank did not come to a collective in time, or is gone; the message names the rank and the call."""
