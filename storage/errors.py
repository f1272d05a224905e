"""What can be wrong with a name or a file, as the few kinds that a caller treats differently.

    StorageError
    ├── BadName        the name or path is not one a client may give          (HTTP 400)
    ├── NotFound       a well-formed name of something that is not there      (HTTP 404)
    ├── NotLoadable    it is there, but damaged, hostile or not ours          (HTTP 422)
    ├── Exists         something has this name already                        (HTTP 409)
    ├── NoSpace        the disk has too little room for what was asked        (HTTP 409)
    ├── NotWritable    the folder may only be read                            (HTTP 409)
    ├── TooLarge       an upload is larger than the limit                     (HTTP 413)
    └── Unreachable    it would have to come from a hub that does not answer  (HTTP 503)

Every message is one sentence for the user: it names what was given and never a path outside the project.
"""


class StorageError(Exception):
    """The base of everything this package refuses."""


class BadName(StorageError):
    """A name or path that no client may give."""


class NotFound(StorageError):
    """Nothing has this name."""


class NotLoadable(StorageError):
    """The file is damaged, hostile, or of another kind."""


class Exists(StorageError):
    """Something has this name already."""


class NoSpace(StorageError):
    """Too little room on the disk."""


class NotWritable(StorageError):
    """A folder that may only be read."""


class TooLarge(StorageError):
    """An upload is larger than the limit."""


class Unreachable(StorageError):
    """A hub does not answer."""
